"""A calibration text: where it lies, and which windows of it are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergekit_plus.calibration import CalibrationOptions, read_text
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError, OptionError

BASE = Path(__file__).parents[1] / "models" / "base"


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_windows_do_not_overlap_and_are_spread_over_the_text(tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", "".join(f"{n:04d}" for n in range(100)))
    rows = read_text([text], Bytes(), windows=10, window=4)
    assert rows.shape == (10, 4)
    numbers = [int(bytes(row.tolist())) for row in rows]
    assert [number // 10 for number in numbers] == list(range(10))  # one in each tenth
    assert torch.equal(rows, read_text([text], Bytes(), windows=10, window=4))
    assert not torch.equal(rows, read_text([text], Bytes(), windows=10, window=4, seed=1))


def test_a_text_that_is_as_long_as_the_windows_is_read_from_end_to_end(tmp_path: Path) -> None:
    rows = read_text([write(tmp_path / "text.txt", "abcdefgh")], Bytes(), windows=5, window=3, seed=3)
    assert bytes(rows.flatten().tolist()) == b"abcdef"


def test_folders_lines_of_json_and_several_texts_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "b.txt", "bb")
    write(tmp_path / "folder" / "a.jsonl", json.dumps({"text": "x", "id": 1}) + "\n\n" + json.dumps({"text": "y"}) + "\n")
    write(tmp_path / "folder" / "c.md", "no")
    rows = read_text([tmp_path / "folder", write(tmp_path / "z.txt", "zz")], Bytes(), windows=9, window=2)
    assert bytes(rows.flatten().tolist()) == b"x\n\nybbzz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"abc", r"the text \(.*short.txt\) has 3 tokens, a window is 4; give a longer text or a smaller --window"),
        ("latin.txt", b"\xff\xfe", "latin.txt: not UTF-8 text"),
        ("lines.jsonl", b'{"text": "abcd"}\n{"txt": "a"}', r'lines.jsonl, line 2: not a JSON object with a "text" that is a string'),
        ("lines.jsonl", b'["text"]', r"lines.jsonl, line 1: not a JSON object"),
        ("folder/none.md", b"abcd", r"folder: no .txt or .jsonl file lies in this folder"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises((CheckpointError, OptionError), match=message):
        read_text([path.parent if "/" in name else path], Bytes(), windows=1, window=4)


def test_a_recipe_says_it_in_short_or_in_full() -> None:
    assert CalibrationOptions.model_validate("a.txt") == CalibrationOptions(texts=["a.txt"])
    assert CalibrationOptions.model_validate(["a.txt", "b"]) == CalibrationOptions(texts=["a.txt", "b"])
    assert CalibrationOptions.model_validate({"texts": "a.txt", "windows": 8}) == CalibrationOptions(texts=["a.txt"], windows=8)


def test_a_text_that_is_not_that_of_the_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "a.txt", "a text " * 100)
    options = CalibrationOptions(texts=["a.txt"], windows=2, window=16).placed(tmp_path)
    model = Checkpoint.open(BASE)
    told = CalibrationOptions.model_validate(options.provenance(tmp_path / "out")).placed(tmp_path / "out")
    assert told.texts == ["../a.txt"]
    assert torch.equal(told.read(model)[0], options.read(model)[0])
    write(tmp_path / "a.txt", "another text " * 100)
    with pytest.raises(CheckpointError, match=r"the text a.txt is not the file that the recipe was made with \(its SHA-256 differs\)"):
        told.read(model)


def test_fewer_windows_than_asked_for_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a text " * 20)
    rows, notes = CalibrationOptions(texts=["a.txt"], windows=900, window=16).placed(tmp_path).read(Checkpoint.open(BASE))
    assert notes == [f"the text has {len(rows)} windows of 16 tokens, not 900; all of it is used"]
    assert list(CalibrationOptions(texts=["b.txt"]).problems(tmp_path)) == [f"the text {tmp_path / 'b.txt'} is not there"]
    assert list(CalibrationOptions().problems(tmp_path)) == ["it names no text"]
