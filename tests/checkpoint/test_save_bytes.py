"""The bytes that are saved depend on the checkpoint alone, and other programs read them."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_toys import files_in, layouts, mapped, random_tensor, same_bits, saving, write_model
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

import mergekit_plus.checkpoint.plan as plans
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.shards import parse_size, plan_shards
from mergekit_plus.errors import OptionError

MODELS = Path(__file__).parents[1] / "models"
TENSORS = {
    **{f"layers.{n}.w": random_tensor("BF16", (64, 33), n) for n in range(6)},
    **{f"dtypes.{tag}": random_tensor(tag, (17, 3)) for tag in sorted(TORCH_DTYPES)},
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "odd": torch.randn(1, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units, many pieces, and a budget that a toy can fill."""
    monkeypatch.setattr(plans, "PIECE", 100)
    monkeypatch.setattr(plans, "SLAB", 700)
    monkeypatch.setattr(layouts, "SLAB", 700)
    monkeypatch.setattr(layouts, "FIXED_COST", 4000)


def doubled(folder: Path) -> Checkpoint:
    source = Checkpoint.open(folder)
    return mapped(source, lambda tensor: tensor.float() * 2 if tensor.dtype in (torch.bfloat16, torch.float32) else tensor)


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files_in(folder).items() if name != "manifest.json"}


@pytest.mark.parametrize("shard_size", [1, 5_000, 10**9])
def test_bytes_are_the_same_for_any_workers_memory_and_input_shards(tmp_path: Path, cut: None, shard_size: int) -> None:
    results = []
    for number, (shards, workers, memory) in enumerate([(1, 1, None), (1, 4, 40_000), (5, 2, 20_000), (5, 4, 10**9), (3, 1, 11_000)]):
        folder = write_model(tmp_path / "in" / str(number), TENSORS, shards)
        out = tmp_path / f"out{number}"
        save(doubled(folder), out, SaveOptions(workers=workers, memory=memory, max_shard_size=shard_size, allow_nonfinite=True))
        results.append(digests(out))
    assert all(result == results[0] for result in results)
    assert len(results[0]) == {1: len(TENSORS) + 2, 5_000: 9, 10**9: 2}[shard_size]  # shards, config and, for several, the index


def test_a_copy_of_a_file_is_that_file(tmp_path: Path, cut: None) -> None:
    save_file(TENSORS, tmp_path / "in.safetensors", {"format": "pt"})
    save(Checkpoint.open(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", SaveOptions(allow_nonfinite=True))
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_saving_in_stages_equals_saving_in_one_stream(tmp_path: Path, cut: None) -> None:
    folder = write_model(tmp_path / "in", {name: tensor for name, tensor in TENSORS.items() if tensor.dtype == torch.bfloat16})
    source = Checkpoint.open(folder)
    save(mapped(source, torch.tanh), tmp_path / "half")
    save(mapped(Checkpoint.open(tmp_path / "half"), torch.neg), tmp_path / "staged")
    save(mapped(mapped(source, torch.tanh), torch.neg), tmp_path / "streamed")
    assert digests(tmp_path / "staged") == digests(tmp_path / "streamed")


def test_the_budget_is_never_exceeded_and_every_unit_is_computed(tmp_path: Path, cut: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flying, peak = threading.Lock(), 0, 0
    write_unit = saving.write_unit

    def watched(step, rows, where, options):  # type: ignore[no-untyped-def]
        nonlocal flying, peak
        cost = layouts.cost(step, rows)
        with lock:
            flying += cost
            peak = max(peak, flying)
        write_unit(step, rows, where, options)
        with lock:
            flying -= cost

    monkeypatch.setattr(saving, "write_unit", watched)
    for memory in (12_000, 20_000, 60_000):
        peak = 0
        save(doubled(write_model(tmp_path / "in", TENSORS)), tmp_path / f"out{memory}", SaveOptions(workers=4, memory=memory, allow_nonfinite=True))
        assert 4000 < peak <= memory


def test_too_little_memory_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = mapped(Checkpoint.from_tensors({"big": torch.ones(1000, 1000)}), torch.neg, multiple=0)
    with pytest.raises(OptionError, match=r"--memory 20 MB is too little: big needs 75 MB at once; give at least that"):
        save(checkpoint, tmp_path / "out", SaveOptions(memory=20_000_000))
    assert not list(tmp_path.iterdir())
    save(checkpoint, tmp_path / "out", SaveOptions(memory=75_200_000, workers=8))


def test_the_layout_depends_on_names_and_shapes_alone() -> None:
    specs = list(Checkpoint.from_tensors(TENSORS).specs.values())
    tied = [plans.TensorSpec(name, "U8", (10,)) for name in ("a1", "a01", "a²", "a٣", "a", "10", "9")]
    assert plan_shards(specs, 2000) == plan_shards(specs[::-1], 2000)
    assert plan_shards(tied, 10) == plan_shards(tied[::-1], 10)
    assert [list(shard.offsets) for shard in plan_shards(tied, 1)] == [["9"], ["10"], ["a"], ["a01"], ["a1"], ["a٣"], ["a²"]]


def test_shards_and_index_are_those_of_huggingface_hub(tmp_path: Path) -> None:
    tensors = {f"layers.{n:02d}.w": torch.full((10, 10), float(n)) for n in range(7)}
    save(Checkpoint.open(write_model(tmp_path / "in", tensors)), tmp_path / "out", SaveOptions(max_shard_size=1000))
    theirs = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    for name, names in theirs.filename_to_tensors.items():
        save_file({key: tensors[key] for key in names}, tmp_path / "theirs", {"format": "pt"})
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1), "b": torch.ones(1000), "c": torch.ones(1)}
    save(Checkpoint.from_tensors(tensors), tmp_path / "out", SaveOptions(max_shard_size=100))
    assert [list(load_file(path)) for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_one_file_is_never_split(tmp_path: Path) -> None:
    save(Checkpoint.from_tensors(TENSORS), tmp_path / "x.safetensors", SaveOptions(max_shard_size=1, allow_nonfinite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.manifest.json", "x.safetensors"]
    again = load_file(tmp_path / "x.safetensors")
    assert all(same_bits(again[name], tensor) for name, tensor in TENSORS.items())


def test_a_model_without_tensors_is_a_model(tmp_path: Path) -> None:
    save(Checkpoint.from_tensors({}), tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").specs == {}


@pytest.mark.parametrize("shard_size", [100_000, 10**9])
def test_transformers_loads_what_is_saved(tmp_path: Path, shard_size: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(Checkpoint.open(MODELS / "base"), tmp_path / "out", SaveOptions(max_shard_size=shard_size))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_size < 10**9)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (MODELS / "base", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids == AutoTokenizer.from_pretrained(MODELS / "base")("hello").input_ids


def test_the_manifest_holds_the_digest_of_every_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "in", TENSORS, 3)
    manifest = save(doubled(folder), tmp_path / "out", SaveOptions(max_shard_size=5000, allow_nonfinite=True), lambda manifest, folder: {"README.md": b"card"})
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written == manifest.as_json()

    def digest(content: bytes) -> dict[str, object]:
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    outputs = files_in(tmp_path / "out")
    assert outputs["README.md"] == b"card"
    del outputs["manifest.json"]
    assert written["outputs"] == {name: digest(content) for name, content in outputs.items()}
    inputs = {name: digest(content) for name, content in files_in(folder).items() if not name.endswith("index.json")}
    assert written["inputs"] == {str(folder): inputs}


def test_describe_sees_the_digests_of_the_shards(tmp_path: Path) -> None:
    seen = []
    save(Checkpoint.from_tensors(TENSORS), tmp_path / "out", SaveOptions(allow_nonfinite=True), lambda manifest, folder: seen.append(manifest.outputs) or {})  # type: ignore[func-returns-value]
    assert list(seen[0]) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("2e9", 2 * 10**9), ("1.5 k", 1500), ("7", 7), (7, 7), (" 1tb ", 10**12), ("1e3kb", 10**6), ("+2b", 2)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "five", "-5GB", "0", "0.5", "nan", "inf", "1e400", "1e30", "1_000", "5 G B", "1e", "--1", "0x10"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(OptionError, match="size"):
        parse_size(text)
