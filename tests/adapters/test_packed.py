"""Packed adapters: what lies in the file to the byte, that they open as what they stand for, and what is refused."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from adapter_toys import adapted, close, load, logits, model_of, saved
from safetensors.torch import load_file, save_file

from mergekit_plus.adapters import open_adapter, read_adapter
from mergekit_plus.checkpoint import Checkpoint, Plan, save, steps_of
from mergekit_plus.errors import CheckpointError, OptionError
from quant.adapters.codebooks import BITS, Codebook
from quant.adapters.coding import Coded, Coding, Scale, decode, table
from quant.adapters.container import Entry, apart_tensors, expanded, is_packed, packed_specs, packed_step, packed_tensors, sidecar
from quant.adapters.modules import factor_entries, factor_names
from quant.adapters.packing import pack
from quant.adapters.plan import QuantizeOptions, quantize_adapter

LINEAR = {"target_modules": ["q_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": LINEAR,
    "rslora and patterns": {**LINEAR, "use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    "dora": {**LINEAR, "use_dora": True},
    "biases": {**LINEAR, "lora_bias": True},
    "whole modules": {**LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "a rank above the sides": {**LINEAR, "r": 20},
}


def packed(folder: Path, out: str = "packed", **options: Any) -> Path:
    """The folder of an adapter at a few bits."""
    save(quantize_adapter(open_adapter(folder), QuantizeOptions(**{"bits": 1, **options})), folder.parent / out)
    return folder.parent / out


def with_peft(base: Path, folder: Path) -> Any:
    """The base with an adapter as peft loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(base), folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_expands_to_what_peft_loads_and_merges(kind: str, tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True}
    saved(model_of(**biased), tmp_path / "base")
    adapted(model_of(**biased), tmp_path / "lora", **KINDS[kind])
    folder = packed(tmp_path / "lora", bits=3)
    save(Checkpoint.open(folder), tmp_path / "expanded")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "expanded"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(tensor, after[name]) == (".lora_A" not in name and ".lora_B.weight" not in name and ".lora_embedding" not in name)
    assert (tmp_path / "expanded/adapter_config.json").read_bytes() == (tmp_path / "lora/adapter_config.json").read_bytes()
    loaded = with_peft(tmp_path / "base", tmp_path / "expanded")
    save(Checkpoint.open(f"{tmp_path / 'base'}+{folder}"), tmp_path / "merged")
    assert close(logits(loaded), logits(load(tmp_path / "merged")), 1e-5)


def test_logits_are_those_of_the_dense_formula(tmp_path: Path) -> None:
    saved(model_of(), tmp_path / "base")
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    opened = read_adapter(Checkpoint.open(packed(tmp_path / "lora")))
    dense = load(tmp_path / "base")
    with torch.no_grad():
        for module in opened.lowrank.values():
            a, b = opened.checkpoint.read(module.a), opened.checkpoint.read(module.b)
            dense.get_submodule(module.module).weight += module.scale * b @ a
    save(opened.checkpoint, tmp_path / "expanded")
    assert close(logits(with_peft(tmp_path / "base", tmp_path / "expanded")), logits(dense), 1e-5)


def test_the_file_is_as_long_as_the_formula(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", r=3, **LINEAR)
    source = open_adapter(tmp_path / "lora")
    specs = [source.checkpoint.specs[name] for name in factor_names(list(source.lowrank.values()))]
    rows = [(3, 16), (3, 16), (3, 32), (3, 16)] * 2  # A and B of q_proj [16, 16], and of down_proj [16, 32], in two blocks
    for bits, codebook, scale in product(BITS, get_args(Codebook), get_args(Scale)):
        columns, scales = (2 if codebook == "k-median" else 1), (1 if scale == "tensor" else 3)
        formula = sum(count * ((width * bits + 7) // 8) + 4 * columns * scales + 8 for count, width in rows) + 4 * 2**bits
        assert sum(spec.nbytes for spec in packed_specs(factor_entries(specs, [Coding(bits, codebook, scale)] * 4))) == formula
        folder = packed(tmp_path / "lora", f"{bits}-{codebook}-{scale}", bits=bits, codebook=codebook, scale=scale, refit=False)
        raw = (folder / "adapter_model.packed.safetensors").read_bytes()
        assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + formula


def test_expanding_is_two_roundings_of_what_is_stored(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", r=3, **LINEAR)
    folder = packed(tmp_path / "lora", bits=2, codebook="k-median")
    stored = load_file(folder / "adapter_model.packed.safetensors")
    said = json.loads((folder / "adapter_quant.json").read_text())
    name, facts = next(iter(said["tensors"].items()))
    assert (said["version"], said["bits"], said["dtype"], facts) == (1, 2, "F32", {"shape": [3, 16 if "q_proj" in name else 32]})
    width = facts["shape"][1]
    codes = torch.stack([stored["codes"][: 3 * width // 4] >> shift & 3 for shift in (0, 2, 4, 6)], 1).view(3, width).long()
    mean, spread = stored["stats"][:3].T
    assert torch.equal(Checkpoint.open(folder).read(name), stored["levels.2"][codes] * spread[:, None] + mean[:, None])
    assert torch.equal(stored["levels.2"], table("k-median", 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_is_kept_and_bytes_are_the_same_every_time(dtype: torch.dtype, tmp_path: Path) -> None:
    adapted(model_of().to(dtype), tmp_path / "lora", **LINEAR)
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "lora/adapter_model.safetensors", {"format": "pt"})
    one, two = packed(tmp_path / "lora", "one"), packed(tmp_path / "lora", "two")
    for name in ("adapter_model.packed.safetensors", "adapter_quant.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    opened = Checkpoint.open(one)
    assert {spec.dtype for spec in opened.specs.values()} == {"F16" if dtype == torch.float16 else "BF16"}
    assert all(opened.read(name).dtype == dtype for name in opened.specs)


def test_rows_may_have_widths_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = (8, 3, 3, 1, 0)
    coding = Coding(bits)
    entry = Entry("lora_B.weight", "F32", (11, 5), 1, coding)
    codes = torch.stack([torch.randint(0, 1 << width, (11,), generator=generator) for width in bits]).to(torch.uint8)
    coded = Coded(codes, torch.rand((5, 1), generator=generator), coding)
    assert entry.code_bytes == 11 + 2 * 5 + 2
    tensors = dict(zip([spec.name for spec in packed_specs([entry])], packed_tensors([entry], [coded]), strict=True))
    whole = expanded(Checkpoint("packed", Checkpoint.from_tensors(tensors).source, {"adapter_quant.json": sidecar([entry])}))
    alone = [decode(Coded(codes[k : k + 1], coded.stats[k : k + 1], Coding((width,)))) for k, width in enumerate(bits)]
    assert torch.equal(whole.read("lora_B.weight"), torch.cat(alone).T)


def test_mixed_widths_lose_less_than_one_for_all_at_the_same_bytes(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    file = tmp_path / "lora/adapter_model.safetensors"
    sizes = torch.tensor([8.0, 1, 0.1, 0.01])
    tensors = {name: tensor * sizes if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    adapter = open_adapter(tmp_path / "lora")
    folders = {"even": packed(tmp_path / "lora", "even", bits=2), "mixed": packed(tmp_path / "lora", "mixed", average_bits=2)}
    lost = dict.fromkeys(folders, 0.0)
    for name, folder in folders.items():
        opened = Checkpoint.open(folder)
        for module in adapter.lowrank.values():
            whole = adapter.checkpoint.read(module.b) @ adapter.checkpoint.read(module.a)
            lost[name] += float((opened.read(module.b) @ opened.read(module.a) - whole).square().sum())
    assert lost["mixed"] < 0.5 * lost["even"]
    bytes_of = {name: load_file(folder / "adapter_model.packed.safetensors")["codes"].numel() for name, folder in folders.items()}
    assert bytes_of["mixed"] <= bytes_of["even"]
    widths = json.loads((folders["mixed"] / "adapter_quant.json").read_text())["tensors"]
    assert all(facts["bits"] == sorted(facts["bits"], reverse=True) for facts in widths.values())
    with pytest.raises(OptionError, match="average_bits=9: above 0 and up to 8; components have widths of their own in the gauge of an SVD"):
        quantize_adapter(adapter, QuantizeOptions(average_bits=9, gauge="none"))


def test_a_result_that_is_not_saved_expands_too(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    result = quantize_adapter(open_adapter(tmp_path / "lora"), QuantizeOptions(1))
    assert is_packed(result)
    assert not is_packed(expanded(result))
    reopened = Checkpoint.open(packed(tmp_path / "lora"))
    assert isinstance(reopened.source, Plan)
    assert len(steps_of(reopened)) == len(reopened.specs)
    assert all(torch.equal(expanded(result).read(name), reopened.read(name)) for name in reopened.specs)


def test_modules_that_change_nothing_expand_to_zeros(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    file = tmp_path / "lora/adapter_model.safetensors"
    tensors = load_file(file)
    still = [name for name in tensors if "layers.0" in name and "lora_B" in name]
    save_file({name: tensor * (name not in still) for name, tensor in tensors.items()}, file, {"format": "pt"})
    opened = Checkpoint.open(packed(tmp_path / "lora"))
    assert still
    assert not any(opened.read(name).any() for name in still)
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="changes nothing: every B is zero, as before training; train it, or make one with `compress adapter train`"):
        packed(tmp_path / "lora", "again")
    tensors[still[0]][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lora_B.weight holds values that are NaN or infinite; mend the adapter"):
        packed(tmp_path / "lora", "again")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    adapter = open_adapter(tmp_path / "lora")
    with pytest.raises(OptionError, match="bits=5: an adapter's codes have 1, 2, 3, 4 or 8 bits; gauge='qr': one of balanced, svd, none"):
        quantize_adapter(adapter, QuantizeOptions(5, gauge="qr"))  # type: ignore[arg-type]
    whole = {name: tensor for name, tensor in load_file(tmp_path / "lora/adapter_model.safetensors").items() if "lora_" not in name}
    whole["base_model.model.model.norm.weight"] = torch.ones(16)
    save_file(whole, tmp_path / "lora/adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no low-rank factors, which are what is quantized"):
        packed(tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="is an adapter of type IA3; LORA is the one that is known here"):
        packed(tmp_path / "lora")
    saved(model_of(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="base is a model, not an adapter"):
        open_adapter(tmp_path / "base")


def test_codes_that_changed_on_the_way_are_found_by_name(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    folder = packed(tmp_path / "lora")
    file = folder / "adapter_model.packed.safetensors"
    tensors = load_file(file)
    names = list(Checkpoint.open(folder).specs)
    for blob in ("codes", "stats", "checksums"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[blob].view(-1).view(torch.uint8)[-1] ^= 1
        save_file(changed, file)
        opened = Checkpoint.open(folder)
        assert opened.read(names[0]).shape
        with pytest.raises(CheckpointError, match=rf"packed: the codes of {names[-1]} are not those that were written \(checksum\); get the file again"):
            opened.read(names[-1])


def test_a_sidecar_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    folder = packed(tmp_path / "lora")
    said = json.loads((folder / "adapter_quant.json").read_text())
    name = next(iter(said["tensors"]))

    def refused(changes: dict[str, Any], match: str) -> None:
        (folder / "adapter_quant.json").write_text(json.dumps({**said, **changes}))
        with pytest.raises(CheckpointError, match=match):
            Checkpoint.open(folder)

    refused({"version": 2}, "adapter_quant.json is of version 2; 1 is the one that is known here")
    refused({"bits": 7}, r"is not what a packed file is described by \(bits 7\)")
    refused({"tensors": []}, "is not what a packed file is described by")
    refused({"tensors": {}}, r"described by \(no tensors\)")
    refused({"tensors": {name: {"shape": [4, -16]}}}, rf"{name} has the shape \(4, -16\)")
    refused({"tensors": {name: {"shape": [1 << 30, 1 << 30]}}}, "has the shape")
    refused({"tensors": {**said["tensors"], name: {"shape": [4, 17]}}}, r"does not fit its tensors: codes is U8 \(\d+,\), but must be U8 \(\d+,\)")
    refused({"scale": "row"}, "scale='row': one of tensor, component, group")
    refused({"tensors": {**said["tensors"], name: {**said["tensors"][name], "bits": [1, 1]}}}, "has 2 widths for 4 rows")
    (folder / "adapter_quant.json").unlink()
    with pytest.raises(CheckpointError, match="has adapter_model.packed.safetensors but no adapter_quant.json, which says what is in it"):
        Checkpoint.open(folder)


def test_an_adapter_for_another_base_names_what_does_not_fit(tmp_path: Path) -> None:
    saved(model_of(hidden_size=32), tmp_path / "wide")
    adapted(model_of(), tmp_path / "lora", **LINEAR)
    folder = packed(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"packed does not fit .*wide: .*mlp.down_proj: \(16, 32\) in the adapter, \(32, 32\) in the base"):
        Checkpoint.open(f"{tmp_path / 'wide'}+{folder}")


def test_parts_of_a_step_are_written_in_the_order_that_was_planned() -> None:
    entry = Entry("w", "F32", (2, 5), 0, Coding())
    coded = Coded(torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.uint8), torch.ones(2, 1), Coding())
    step = packed_step([entry], [], lambda tensors: [coded])
    codes, stats, checksums, levels = step.run([], 0, None)
    assert (codes.tolist(), stats.tolist(), levels.tolist()) == ([0b101, 0b10000], [[1.0], [1.0]], table("l2", 1).tolist())
    assert checksums.shape == (1, 8)
    assert [tensor.shape for tensor in apart_tensors(coded)] == [(2, 1), (2, 1), (8,)]
    assert pack(coded.codes, 1).flatten().tolist() == codes.tolist()
