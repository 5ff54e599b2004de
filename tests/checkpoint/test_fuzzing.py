"""The readers of headers and indexes under fire: never another error than ours, never another model than the safetensors library reads."""

from __future__ import annotations

import random
from pathlib import Path

import fuzzing
import pytest
from fuzzing import CORPUS, TOKENS, Memory, edited, edited_file, random_edits, wrong_with_file, wrong_with_index
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.safetensors import read_header
from mergekit_plus.errors import CheckpointError

SEEDS = sorted(set(CORPUS.glob("*.bin")) - set(CORPUS.glob("index-*.bin")))
INDEXES = sorted(CORPUS.glob("index-*.bin"))
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), st.sampled_from(TOKENS) | st.binary(max_size=4)), max_size=4)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.stem)
def test_the_seeds_are_read_or_refused_as_they_are_called(seed: Path) -> None:
    content = seed.read_bytes()
    assert wrong_with_file(content) is None
    if seed.stem.startswith("ok-"):
        read_header(Memory(content))
    else:
        with pytest.raises(CheckpointError):
            read_header(Memory(content))


@settings(max_examples=1000)
@given(st.sampled_from(SEEDS), edits, st.booleans())
def test_an_edited_file_is_read_as_the_library_reads_it_or_refused(seed: Path, edits: list[fuzzing.Edit], recount: bool) -> None:
    assert wrong_with_file(edited_file(seed.read_bytes(), edits, recount)) is None


@settings(max_examples=500)
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_read_as_the_library_reads_it_or_refused(noise: bytes, recount: bool) -> None:
    assert wrong_with_file(len(noise).to_bytes(8, "little") + noise if recount else noise) is None


def test_thousands_of_random_edits_find_nothing_and_miss_nothing() -> None:
    rng = random.Random(0)
    seed = (CORPUS / "ok-three.bin").read_bytes()
    accepted = 0
    for _ in range(3000):
        content = edited_file(seed, random_edits(rng), recount=True)
        assert wrong_with_file(content) is None, content
        try:
            read_header(Memory(content))
            accepted += 1
        except CheckpointError:
            pass
    assert 300 < accepted < 2700  # the edits neither miss nor always hit


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shards and no index."""
    folder = tmp_path_factory.mktemp("index")
    fuzzing.write_shards(folder)
    return folder


@settings(max_examples=300)
@given(st.sampled_from(INDEXES), edits)
def test_an_edited_index_is_refused_unless_it_still_says_the_truth(shards: Path, seed: Path, edits: list[fuzzing.Edit]) -> None:
    assert wrong_with_index(edited(seed.read_bytes(), edits), shards) is None


@pytest.mark.parametrize("seed", INDEXES, ids=lambda path: path.stem)
def test_the_seeds_of_indexes_are_read_or_refused_as_they_are_called(shards: Path, seed: Path) -> None:
    assert wrong_with_index(seed.read_bytes(), shards) is None
    if seed.stem == "index-whole":
        assert set(Checkpoint.open(shards).specs) == {"a", "b", "w"}
    else:
        with pytest.raises(CheckpointError):
            Checkpoint.open(shards)


def test_the_long_run_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fuzzing.py", "--seconds", "0.2"])
    fuzzing.main()
    assert capsys.readouterr().out.endswith("tried, nothing found\n")


def test_a_rule_that_is_broken_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (CORPUS / "no-overlap.bin").read_bytes()
    monkeypatch.setattr(fuzzing, "read_header", lambda memory: read_header(Memory((CORPUS / "ok-one.bin").read_bytes())))
    assert "the library refuses it" in str(wrong_with_file(whole))
    assert "we read" in str(wrong_with_file((CORPUS / "ok-three.bin").read_bytes()))
