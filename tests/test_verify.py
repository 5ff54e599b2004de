"""`compress verify`: an output against its manifest, its inputs against what was recorded of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from safetensors.torch import save_file

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, ReadError
from mergekit_plus.recipe import check, run
from mergekit_plus.steps import Execution
from mergekit_plus.verify import verify


def model(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": torch.arange(8.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run(check({"inputs": {"m": str(model(tmp_path / "in"))}}, tmp_path, "test"), Execution(out=tmp_path / "out"))
    return tmp_path / "out"


def problems(out: Path, inputs: bool = False) -> list[tuple[str, str]]:
    return [(Path(each["file"]).name, each["problem"]) for each in verify(out, inputs).problems]


def test_what_was_just_written_is_as_recorded(out: Path) -> None:
    found = verify(out, inputs=True)
    assert (found.problems, found.notes) == ([], [])
    assert found.files == len(list(out.iterdir())) - 1 + 2  # all but the manifest, and the two of the input
    assert list(json.loads((out / "manifest.json").read_bytes())["places"].values()) == ["../in"]


def test_every_difference_is_named_and_other_files_are_noted(out: Path) -> None:
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    (out / "config.json").write_bytes(b"{} ")
    (out / "recipe.yaml").unlink()
    (out / "mine.txt").touch()
    found = dict(problems(out))
    assert found.pop("model.safetensors").startswith("its SHA-256 is ")
    assert found == {"config.json": "it is 3 bytes long, not 2", "recipe.yaml": "it is missing"}
    assert verify(out).notes == ["mine.txt is not in the manifest"]


def test_an_input_that_changed_or_is_gone_is_named(out: Path) -> None:
    (out.parent / "in" / "config.json").write_text('{"a": 1}')
    assert problems(out) == []
    assert problems(out, inputs=True) == [("config.json", "it is 8 bytes long, not 2")]
    shutil.rmtree(out.parent / "in")
    assert problems(out, inputs=True) == [("config.json", "it is missing"), ("model.safetensors", "it is missing")]


def test_output_and_inputs_may_move_together(out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("in", "out"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert problems(tmp_path / "elsewhere" / "out", inputs=True) == []


def test_a_single_file_is_verified_by_the_manifest_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    save(Checkpoint.open(model(tmp_path / "in")), out)
    assert problems(out, inputs=True) == []
    assert verify(out).notes == []
    os.truncate(out, 100)
    assert problems(out)[0][1].startswith("it is 100 bytes long, not ")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"outputs": {"../in/config.json": {"bytes": 2, "sha256": ""}}, "inputs": {}}', '{"outputs": {"a": {"bytes": 2}}, "inputs": {}}',
     '{"outputs": {}, "inputs": [], "places": {}}', '{"outputs": {}, "inputs": {}, "places": {"a": 1}}'],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(out: Path, content: str) -> None:
    (out / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not a manifest"):
        verify(out)
    (out / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="without its manifest"):
        verify(out)


def test_inputs_on_the_hub_are_compared_with_what_it_lists(own_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_hub.commit("org/name", model(tmp_path / "m"))
    out = tmp_path / "out"
    run(check({"inputs": {"m": "org/name"}}, tmp_path, "test"), Execution(out=out))
    own_hub.log.clear()
    found = verify(out, inputs=True)
    assert (found.problems, found.notes) == ([], [])
    assert not own_hub.requests("resolve.*safetensors")  # its SHA-256 is in the listing
    manifest = json.loads((out / "manifest.json").read_bytes())
    (files,) = manifest["inputs"].values()
    files["model.safetensors"]["sha256"] = "0" * 64
    files["gone.json"] = files["config.json"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert [(name, problem[:15]) for name, problem in problems(out, inputs=True)] == [("model.safetensors", "its SHA-256 is "), ("gone.json", "it is missing")]
    own_hub.fault("api/", status=503, times=100)
    with pytest.raises(ReadError, match="the Hub cannot be reached"):
        verify(out, inputs=True)
