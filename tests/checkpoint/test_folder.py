"""Model folders: shards and their index must tell one story, and a wrong path is answered with the right one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import header_bytes, same_bits, write_model
from safetensors.torch import save_file

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.folder import INDEX, SINGLE
from mergekit_plus.errors import CheckpointError

TENSORS = {f"model.layers.{n}.weight": torch.full((2, 2), float(n)) for n in (0, 1, 2, 10)}


def reindex(folder: Path, **changes: Any) -> None:
    """Put these entries into the index; None takes one out."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: shard for name, shard in {**index["weight_map"], **changes}.items() if shard is not None}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_folder_is_the_same_checkpoint_however_it_is_sharded(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(write_model(tmp_path / "m", TENSORS, shards))
    assert list(checkpoint.specs) == list(TENSORS)  # natural order: 10 after 2
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert checkpoint.config == {"model_type": "toy"}
    assert checkpoint.label == str(tmp_path / "m")
    assert checkpoint.nbytes == 64


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, 2)
    save_file({"only": torch.ones(1)}, folder / SINGLE)
    assert list(Checkpoint.open(folder).specs) == ["only"]


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "a\\b.safetensors", "a.bin", "", ".safetensors\n", "a\0.safetensors", ".."],
)
def test_a_shard_is_a_plain_name_in_the_folder(tmp_path: Path, shard: str) -> None:
    folder = write_model(tmp_path / "m", TENSORS, 2)
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    reindex(folder, x=shard)
    with pytest.raises(CheckpointError, match=r"which is not the name of a \.safetensors file in its folder"):
        Checkpoint.open(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, 4)
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004\.safetensors is missing; model.* lists it among 4 shards"):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_lists_must_be_in_its_shard(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, 2)
    reindex(folder, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"says that 'ghost' is in model-00001-of-00002\.safetensors, but it is not there"):
        Checkpoint.open(folder)
    reindex(folder, ghost=None, **{"model.layers.0.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"says that 'model\.layers\.0\.weight' is in model-00002"):
        Checkpoint.open(folder)


def test_a_tensor_in_a_shard_must_be_in_the_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, 2)
    reindex(folder, **{"model.layers.10.weight": None})
    with pytest.raises(CheckpointError, match=r"holds 'model\.layers\.10\.weight', which model\.safetensors\.index\.json does not list"):
        Checkpoint.open(folder)


def test_a_tensor_lies_in_one_shard_only(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS, 2)
    save_file({**{name: TENSORS[name] for name in list(TENSORS)[1::2]}, "model.layers.0.weight": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.weight' is in model-00001-of-00002\.safetensors and again in model-00002"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "values"),
        ('{"weight_map": {"a": 1}}', "weight_map must give a file name for each tensor"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "1 of its keys appear twice"),
        ('{"weight_map": {}, "weight_map": {}}', "1 of its keys appear twice"),
        ("[" * 100_000, "recursion"),
        ("\udcff", "decode"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is not an index of safetensors shards \(.*" + reason):
        Checkpoint.open(tmp_path)


def test_an_index_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="longer than 100000000 bytes"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "holds no model.safetensors and no model.safetensors.index.json"),
        (["config.json", "tokenizer.json"], "holds no model.safetensors"),
        (["pytorch_model.bin", "config.json"], r"holds only a pickle checkpoint; pickles can run code"),
        (["model.pth"], "holds only a pickle checkpoint"),
        (["adapter_config.json", "adapter_model.bin"], r"is a PEFT adapter without adapter_model\.safetensors; pickles can run code"),
        (["unet.safetensors", "vae.safetensors"], r"has unet\.safetensors, vae\.safetensors but neither .*; name the \.safetensors file itself"),
    ],
)
def test_a_folder_without_a_model_says_what_it_is(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(tmp_path)


def test_a_misspelt_path_is_answered_with_the_nearest(tmp_path: Path) -> None:
    write_model(tmp_path / "llama-base", TENSORS)
    with pytest.raises(CheckpointError, match=r"no such file or folder, and not an org/name on the Hub\. Did you mean 'llama-base'\?"):
        Checkpoint.open(tmp_path / "lama-base")
    with pytest.raises(CheckpointError, match=r"Did you mean 'model\.safetensors'\?"):
        Checkpoint.open(str(tmp_path / "llama-base" / "model.safetensor"))
    with pytest.raises(CheckpointError, match=r"not an org/name on the Hub\.$"):
        Checkpoint.open(tmp_path / "nothing" / "like" / "it")


@pytest.mark.parametrize("ref", ["x" * 300, "a\0b", "~nobody-of-this-name/x", ""])
def test_a_path_that_cannot_be_is_one_line(ref: str) -> None:
    with pytest.raises(CheckpointError, match=r"^[^\n]*$"):
        Checkpoint.open(ref)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading one would wait for ever
    with pytest.raises(CheckpointError, match="no such file or folder"):
        Checkpoint.open(tmp_path / "pipe.safetensors")
    folder = write_model(tmp_path / "m", TENSORS, 2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("blobs", ["models--org--name/blobs", "blobs", "models--org--name/snapshots/0123/sub"])
def test_a_link_may_lead_to_the_blobs_of_the_hubs_cache_or_within_its_folder(tmp_path: Path, blobs: str) -> None:
    folder = write_model(tmp_path / "models--org--name" / "snapshots" / "0123", TENSORS, 2)
    (tmp_path / blobs).mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(tmp_path / blobs / f"{path.name} of old")
        path.symlink_to(os.path.relpath(tmp_path / blobs / f"{path.name} of old", folder))
    assert len(Checkpoint.open(folder).specs) == 4
    (tmp_path / "link").symlink_to(folder)
    assert len(Checkpoint.open(tmp_path / "link").specs) == 4


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", INDEX])
def test_a_link_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m", TENSORS, 2)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*/elsewhere, outside of the model's folder; put the file itself there"):
        Checkpoint.open(folder)


def test_an_adapters_folder_opens_as_its_own_tensors_and_carries_its_config(tmp_path: Path) -> None:
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    adapter = Checkpoint.open(tmp_path)
    assert list(adapter.specs) == ["base_model.model.q_proj.lora_A.weight"]
    assert list(adapter.files) == ["adapter_config.json"]
    write_model(tmp_path, TENSORS)
    assert list(Checkpoint.open(tmp_path).specs) == list(TENSORS)  # a whole model comes first, and is no adapter
    assert list(Checkpoint.open(tmp_path).files) == ["config.json"]


def test_the_small_files_of_a_model_travel_with_it_and_no_others(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TENSORS)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md", "train.py", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"x")
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.files) == ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"]
    assert checkpoint.file("tokenizer.json") == b"x"
    assert Checkpoint.open(folder / SINGLE).files == {}


def test_a_config_that_is_none_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    for text, reason in (("{", "config.json is not JSON"), ("[]", "is not a JSON object"), ("[" * 100_000, "is not JSON")):
        folder = write_model(tmp_path, TENSORS)
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            _ = Checkpoint.open(folder).config


def test_with_config_changes_and_removes_keys(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_model(tmp_path, TENSORS, config={"a": 1, "b": 2}))
    assert checkpoint.with_config(a=3, b=None).config == {"a": 3}
    assert checkpoint.config == {"a": 1, "b": 2}
    bare = Checkpoint.from_tensors(TENSORS)
    assert bare.with_config(a=3) is bare


def test_an_unknown_tensor_is_answered_with_the_nearest() -> None:
    with pytest.raises(CheckpointError, match=r"memory has no tensor 'model\.layers\.1\.wait'\. Did you mean 'model\.layers\.1\.weight'\?"):
        Checkpoint.from_tensors(TENSORS).read("model.layers.1.wait")


def test_rows_beyond_a_tensor_are_not_the_next_tensors_bytes(tmp_path: Path) -> None:
    table = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * n, 2 * n + 2]} for n, name in enumerate("ab")}
    (tmp_path / "x.safetensors").write_bytes(header_bytes(table, b"\1\2\3\4"))
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert checkpoint.read("a", slice(1, 2)).tolist() == [2]
    for rows in (slice(0, 3), slice(2, 1), slice(-1, 1)):
        with pytest.raises(ValueError, match="a has 2 rows"):
            checkpoint.read("a", rows)
