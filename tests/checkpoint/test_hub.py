"""Names of the Hub: what they mean, what they open, and when the Hub is out of reach, silent or says no, that is one line and soon."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_toys import python, same_bits, write_model
from hub_client import compress
from hub_server import TOKEN, Hub
from safetensors.torch import save as serialize

import mergekit_plus.checkpoint.ranges as ranges
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.checkpoint.hub import Reference, parse_reference
from mergekit_plus.errors import CheckpointError, Unreachable

OPEN = """
import sys
import mergekit_plus.checkpoint.hub as hub
import mergekit_plus.checkpoint.ranges as ranges
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
assert hub.PATIENCE == 10
hub.PATIENCE = 0.5
ranges.PAUSE = 0.01
for ref in sys.argv[1:]:
    try:
        print(sorted(Checkpoint.open(ref).specs))
    except CheckpointError as error:
        print(error)
"""
TENSORS = {f"model.layers.{n}.weight": torch.full((4, 8), float(n)) for n in range(3)}


def opened(home: Path, *refs: str, **environment: str) -> list[str]:
    """A line for each name: its tensors, or the error."""
    result = python(f"import os; os.chdir({str(home)!r})\n" + OPEN, *refs, HF_HOME=str(home), **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(refs)
    return lines


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cache that holds org/name, beside a folder local/name."""
    sha = "0" * 40
    folder = tmp_path / "hub" / "models--org--name"
    write_model(folder / "snapshots" / sha, {"w": torch.ones(2)})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)
    write_model(tmp_path / "local" / "name", {"mine": torch.ones(2)})
    return tmp_path


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", Reference("org/name")),
        ("hf://org/name", Reference("org/name")),
        ("org/name@v1.0", Reference("org/name", "v1.0")),
        ("hf://org/name@v1/sub/folder", Reference("org/name", "v1", "sub/folder")),
        ("org/name/sub/folder@v1", Reference("org/name", "v1", "sub/folder")),
        ("org/name/sub@feature/x", Reference("org/name", "feature/x", "sub")),
        ("org/name@feature%2Fx", Reference("org/name", "feature/x")),
        ("org/name@refs/pr/7/sub", Reference("org/name", "refs/pr/7", "sub")),
        ("org/name/a.safetensors", Reference("org/name", "", "a.safetensors")),
        ("name", None),
        ("org/name@", None),
        ("org/name@v1/sub@v2", None),
        ("org/../name", None),
        ("org/name/../other", None),
        ("./org/name", None),
        ("org/na me", None),
        ("https://huggingface.co/org/name", None),
    ],
)
def test_a_reference_names_a_repository_a_revision_and_a_path(text: str, reference: Reference | None) -> None:
    assert parse_reference(text) == reference
    if reference:
        assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize("out_of_reach", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_out_of_reach_an_unknown_name_is_one_line_and_a_cached_one_opens(home: Path, out_of_reach: dict[str, str]) -> None:
    unknown, pinned, impossible, cached, local = opened(home, "no/such", "no/such@v1", "a--b/c", "org/name", "local/name", **out_of_reach)
    way_back = "unset HF_HUB_OFFLINE" if out_of_reach["HF_HUB_OFFLINE"] == "1" else "try again when http://127.0.0.1:9 answers"
    assert unknown == f"no/such: not a local path, and the Hub cannot be reached; nor is it in the local cache ({way_back})"
    assert pinned == unknown
    assert impossible.startswith("a--b/c: no such file or folder, and not a name that the Hub could have")
    assert cached == "['w']"
    assert local == "['mine']"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes every connection and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_is_silent_is_not_waited_for(home: Path, silent_server: str) -> None:
    unknown, cached = opened(home, "no/such", "org/name", HF_HUB_OFFLINE="0", HF_ENDPOINT=silent_server)
    assert "the Hub cannot be reached" in unknown
    assert cached == "['w']"


@pytest.fixture
def toy(own_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with org/name in three shards, a folder `sub` of it with other values, an adapter and a bare file."""
    monkeypatch.setattr(ranges, "PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", TENSORS, 3)
    write_model(tmp_path / "m" / "sub" / "half", {name: tensor / 2 for name, tensor in TENSORS.items()})
    (tmp_path / "m" / "adapter").mkdir()
    (tmp_path / "m" / "adapter" / "adapter_model.safetensors").write_bytes(serialize({"base_model.model.q.lora_A.weight": torch.ones(2, 4)}))
    (tmp_path / "m" / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    own_hub.commit("org/name", tmp_path / "m")
    return own_hub


def test_a_repository_a_folder_a_file_and_an_adapter_open(toy: Hub) -> None:
    sha = toy.repositories["org/name"].branches["main"]
    whole = Checkpoint.open("hf://org/name@main")
    assert (whole.label, whole.pinned) == ("hf://org/name@main", f"org/name@{sha}")
    assert list(whole.specs) == list(TENSORS)
    assert all(same_bits(whole.read(name), tensor) for name, tensor in TENSORS.items())
    assert list(whole.files) == ["config.json"]
    assert whole.config == {"model_type": "toy"}
    half = Checkpoint.open("org/name/sub/half")
    assert half.pinned == f"org/name@{sha}/sub/half"
    assert float(half.read("model.layers.2.weight")[0, 0]) == 1.0
    file = Checkpoint.open(f"org/name@{sha}/model-00002-of-00003.safetensors")
    assert list(file.specs) == ["model.layers.1.weight"]
    assert file.files == {}
    adapter = Checkpoint.open("org/name/adapter")
    assert list(adapter.specs) == ["base_model.model.q.lora_A.weight"]
    assert list(adapter.files) == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("org/name@v9", "org/name has no revision 'v9' (a slash in a branch's name is written %2F)"),
        ("org/name/sub", "org/name@{sha}/sub holds no files."),
        ("org/name/nothing", "org/name@{sha}/nothing holds no files."),
        ("org/name/sub/half/config.json", "org/name@{sha}/sub/half/config.json is not a .safetensors file"),
        ("org/missing", "org/missing: no such file or folder, and no such repository on the Hub (or it is private: `hf auth login`)"),
        ("org/pickle", "org/pickle@{short} holds only a pickle checkpoint; pickles can run code and are not read"),
        ("org/torn", "org/torn@{short}/b.safetensors is missing; model.safetensors.index.json lists it among 1 shards"),
        ("org/evil", "names the shard '../x.safetensors', which is not the name of a .safetensors file in its folder"),
    ],
)
def test_what_cannot_be_opened_is_one_line(toy: Hub, ref: str, error: str) -> None:
    toy.commit("org/pickle", {"pytorch_model.bin": b"\x80"})
    toy.commit("org/torn", {"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}', "sub/b.safetensors": b""})
    toy.commit("org/evil", {"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}', "x.safetensors": b""})
    sha = toy.repositories[ref.split("@")[0] if ref.split("@")[0] in toy.repositories else "org/name"].branches["main"]
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(ref)
    assert error.format(sha=sha, short=sha[:7]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gated_private_and_revoked_are_one_line_each(toy: Hub, tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.commit("org/gated", tmp_path / "m", gated=True)
    toy.commit("org/private", tmp_path / "m", private=True)
    assert len(Checkpoint.open("org/gated").specs) == len(Checkpoint.open("org/private").specs) == 3
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"^org/gated is gated: ask for access on its page, then `hf auth login`$"):
        Checkpoint.open("org/gated")
    with pytest.raises(CheckpointError, match=r"org/private: .*no such repository on the Hub \(or it is private"):
        Checkpoint.open("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(CheckpointError, match=r"^org/name: the Hub does not accept the token \(401\); log in with `hf auth login`$"):
        Checkpoint.open("org/name")


def test_a_hub_that_is_down_is_asked_again_and_then_is_out_of_reach(toy: Hub) -> None:
    toy.fault("GET /api/models/org/name", status=503, times=2)
    assert len(Checkpoint.open("org/name").specs) == 3
    toy.fault("GET /api/models/org/name", status=503, times=99)
    with pytest.raises(Unreachable, match="the Hub cannot be reached; nor is it in the local cache"):
        Checkpoint.open("org/name")


def test_a_cached_repository_is_read_from_the_cache(toy: Hub) -> None:
    from huggingface_hub import snapshot_download

    folder = snapshot_download("org/name")
    before = len(toy.requests("resolve"))
    checkpoint = Checkpoint.open("org/name")
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert checkpoint.config == {"model_type": "toy"}
    assert len(toy.requests("resolve")) == before  # asked for the commit's name, and for nothing else
    assert str(checkpoint.files["config.json"]).startswith(folder)
    assert checkpoint.pinned == f"org/name@{toy.repositories['org/name'].branches['main']}"
    toy.commit("org/name", {"model.safetensors": serialize({"new": torch.ones(1)})})
    assert list(Checkpoint.open("org/name").specs) == ["new"]  # the branch has moved on, the cache has not


def test_cache_brings_the_files_to_the_disk_once_and_no_others(toy: Hub) -> None:
    checkpoint = Checkpoint.open("org/name", cache=True)
    asked = {request.path.rpartition("/")[2] for request in toy.requests("GET .*resolve")}
    assert asked == {"config.json", "model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))}
    before = len(toy.requests("resolve"))
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert len(Checkpoint.open("org/name", cache=True).specs) == 3
    assert len(toy.requests("resolve")) == before


def test_shards_with_names_of_their_own_are_cached_too_and_a_second_copy_of_the_weights_is_not(toy: Hub, tmp_path: Path) -> None:
    files = {path.name.replace("model-", "part-"): path.read_bytes().replace(b"model-", b"part-") for path in (tmp_path / "m").iterdir() if path.is_file()}
    toy.commit("org/parts", files)
    assert len(Checkpoint.open("org/parts", cache=True).specs) == 3
    before = len(toy.requests("resolve"))
    assert len(Checkpoint.open("org/parts").specs) == 3
    assert len(toy.requests("resolve")) == before
    toy.commit("org/both", {**files, "model.safetensors": serialize({"whole": torch.ones(1)})})
    assert list(Checkpoint.open("org/both", cache=True).specs) == ["whole"]
    assert not toy.requests("org/both/resolve/.*part-")


def test_a_file_that_the_cache_holds_with_a_wrong_byte_fails_the_save(toy: Hub, tmp_path: Path) -> None:
    toy.fault("GET .*model-00002", flip=200)  # huggingface_hub looks at the size alone
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is not the file that the Hub lists \(its SHA-256 differs\)"):
        save(Checkpoint.open("org/name", cache=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_and_a_folder_open_from_the_cache_too(toy: Hub) -> None:
    for _ in range(2):
        assert list(Checkpoint.open("org/name/model-00002-of-00003.safetensors", cache=True).specs) == ["model.layers.1.weight"]
        assert float(Checkpoint.open("org/name/sub/half", cache=True).read("model.layers.2.weight")[0, 0]) == 1.0
    toy.fault("GET /api/", status=503, times=99)
    assert list(Checkpoint.open("org/name/model-00002-of-00003.safetensors").specs) == ["model.layers.1.weight"]
    assert len(Checkpoint.open("org/name@main/sub/half").specs) == 3
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        Checkpoint.open("org/name/adapter")


def test_a_cache_in_which_a_file_is_missing_is_not_read(toy: Hub) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/name", "config.json")
    assert len(Checkpoint.open("org/name").specs) == 3
    assert all(same_bits(Checkpoint.open("org/name").read(name), tensor) for name, tensor in TENSORS.items())


def test_offline_reads_the_cache_and_no_token_is_ever_shown(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "m", TENSORS, 2)
    hub.commit("org/name", tmp_path / "m", private=True)
    told = compress(hub, "merge", "org/name", "org/name@main", "-o", "out", "--cache", home=tmp_path / "home", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    before = len(hub.log)
    offline = compress(hub, "merge", "org/name", "org/name", "-o", "again", home=tmp_path / "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    unknown = compress(hub, "merge", "org/name", "org/other", "-o", "never", home=tmp_path / "home", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert unknown.returncode == 2
    assert unknown.stderr == "compress: org/other: not a local path, and the Hub cannot be reached; nor is it in the local cache (unset HF_HUB_OFFLINE)\n"
    assert len(hub.log) == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    written = b"".join(path.read_bytes() for out in ("out", "again") for path in (tmp_path / out).iterdir())
    assert TOKEN.encode() not in written
    assert all(TOKEN not in text for told in (told, offline, unknown) for text in (told.stdout, told.stderr))
