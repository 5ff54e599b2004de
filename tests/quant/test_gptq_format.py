"""GPTQ's files, both versions, and AWQ's: bit by bit against loops over their definitions, ours and what others write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.dtypes import TAGS
from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.errors import CheckpointError, OptionError
from quant import FORMATS, READERS, Quantized, Scheme, read_config, rtn
from quant import dequantize as values_of
from quant.formats import stored_as
from quant.plan import dequantize, quantize

WIDTHS = (2, 3, 4, 8)
GOLDEN = Path(__file__).with_name("golden_gptqmodel.safetensors")  # packed by GPTQModel 7.7: benchmarks/parity_gptqmodel.py --write-golden
SCHEMES = [Scheme(bits, group, symmetric) for bits in WIDTHS for group in (0, 32, 64) for symmetric in (True, False)]


def a_weight(rows: int = 64, width: int = 128) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)) / 50).half()


def fields(words: list[int], bits: int) -> list[int]:
    """The unsigned fields of a stream of int32 words, lowest bits first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(32 * len(words) // bits)]


def words_of(values: list[int], bits: int) -> list[int]:
    """The inverse of `fields`."""
    stream = sum(value << (bits * place) for place, value in enumerate(values))
    found = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def by_definition(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """scales[g_idx] * (code - zero), in float64, one column at a time."""
    codes = torch.tensor([fields(column, bits) for column in tensors["qweight"].T.tolist()])  # [out, in]
    zeros = torch.tensor([fields(row, bits) for row in tensors["qzeros"].tolist()]) + (version == 1)  # [groups, out]
    group = tensors["g_idx"].long()
    return (codes - zeros.T[:, group]) * tensors["scales"].double().T[:, group]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_what_is_written_means_the_codes_by_the_definition(layout: str, scheme: Scheme) -> None:
    written, version = FORMATS[layout], 1 if layout == "gptq" else 2
    if written.refuses(scheme):
        assert (version, scheme.symmetric) == (1, False)
        return
    quantized = rtn(a_weight(), scheme)
    tensors = written.encode(quantized)
    assert torch.equal(by_definition(tensors, scheme.bits, version).half(), values_of(quantized))
    assert torch.equal(READERS[layout].values(tensors, scheme, (64, 128)), values_of(quantized))
    back = READERS[layout].decode(tensors, scheme, (64, 128))
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scale, quantized.scale)
    assert (back.zero_point is None) == (quantized.zero_point is None)
    specs = [TensorSpec(f"up.{name}", TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert specs == list(written.specs(TensorSpec("up.weight", "F16", (64, 128)), scheme))


def test_the_words_of_symmetric_zero_points_are_those_that_everybody_writes() -> None:
    first = {bits: FORMATS["gptq"].encode(rtn(a_weight(), Scheme(bits, 0)))["qzeros"][0, 0].item() & 0xFFFFFFFF for bits in (2, 4, 8)}
    assert first == {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}
    second = {bits: FORMATS["gptq_v2"].encode(rtn(a_weight(), Scheme(bits, 0)))["qzeros"][0, 0].item() & 0xFFFFFFFF for bits in (2, 4, 8)}
    assert second == {2: 0xAAAAAAAA, 4: 0x88888888, 8: 0x80808080}


def test_packed_codes_are_those_of_pack_quantized_turned() -> None:
    quantized = rtn(a_weight(), Scheme(3, 32, False))
    ours, other = FORMATS["gptq_v2"].encode(quantized), FORMATS["pack-quantized"].encode(quantized)
    assert torch.equal(ours["qweight"], other["weight_packed"].T)
    assert torch.equal(ours["qzeros"], other["weight_zero_point"].T)
    assert torch.equal(ours["scales"], other["weight_scale"].T)


def test_version_one_with_borrowed_words_is_read_as_gptqmodel_reads_it() -> None:
    """Its writer subtracts 0x1111... from whole words: a zero point of 0 borrows from the next field, and its reader gives that back."""
    quantized = rtn(a_weight(), Scheme(4, 32, False))
    quantized.zero_point[3] = -8  # type: ignore[index]
    tensors = FORMATS["gptq_v2"].encode(quantized)
    tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    assert torch.equal(READERS["gptq"].decode(tensors, Scheme(4, 32, False), (64, 128)).zero_point, quantized.zero_point)


def test_version_one_of_three_bits_is_read_field_by_field() -> None:
    quantized = rtn(a_weight(), Scheme(3, 32, False))
    tensors = FORMATS["gptq_v2"].encode(quantized)
    tensors["qzeros"] = torch.tensor([words_of([(field - 1) % 8 for field in fields(row, 3)], 3) for row in tensors["qzeros"].tolist()], dtype=torch.int32)
    assert torch.equal(READERS["gptq"].decode(tensors, Scheme(3, 32, False), (64, 128)).zero_point, quantized.zero_point)


@pytest.mark.parametrize(("layout", "other"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_symmetric_codes_under_the_name_of_the_other_version_are_read_all_the_same(layout: str, other: str) -> None:
    quantized = rtn(a_weight(), Scheme(4, 32))
    assert torch.equal(READERS[layout].values(FORMATS[other].encode(quantized), Scheme(4, 32), (64, 128)), values_of(quantized))
    asymmetric = FORMATS["gptq_v2"].encode(rtn(a_weight(), Scheme(4, 32, False)))
    with pytest.raises(CheckpointError, match=r"says that it is symmetric, but its zero points \(qzeros\) are not all 8"):
        READERS[layout].values(asymmetric, Scheme(4, 32), (64, 128))


def test_inputs_in_the_order_of_their_activations_are_dequantized_and_not_converted() -> None:
    scheme, order = Scheme(4, 32, False), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    quantized = rtn(a_weight(), scheme)
    tensors = FORMATS["gptq_v2"].encode(Quantized(quantized.codes[:, torch.argsort(order)], quantized.scale, quantized.zero_point, 4))
    tensors["g_idx"] = torch.empty(128, dtype=torch.int32).scatter_(0, order, torch.arange(128, dtype=torch.int32) // 32)
    values = READERS["gptq_v2"].values(tensors, scheme, (64, 128))
    assert torch.equal(values, by_definition(tensors, 4, 2).half())
    assert torch.equal(values[:, order], values_of(quantized))
    with pytest.raises(CheckpointError, match="in the order of their activations"):
        READERS["gptq_v2"].decode(tensors, scheme, (64, 128))
    for wrong in (torch.zeros(128, dtype=torch.int32), tensors["g_idx"] - 1, tensors["g_idx"] * 1000):
        with pytest.raises(CheckpointError, match=r"its groups \(g_idx\) do not have 32 inputs each"):
            READERS["gptq_v2"].values({**tensors, "g_idx": wrong}, scheme, (64, 128))


@pytest.mark.parametrize("group", [0, 32])
def test_awq_is_read_nibble_by_nibble(group: int) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (64, 128), generator=generator)  # [out, in], unsigned
    groups = 128 // (group or 128)
    zeros = torch.randint(0, 16, (64, groups), generator=generator)
    scales = torch.rand(groups, 64, generator=generator).half()

    def packed(rows: list[list[int]]) -> Tensor:
        return torch.tensor([words_of([row[8 * (k // 8) + order[k % 8]] for k in range(64)], 4) for row in rows], dtype=torch.int32)

    tensors = {"qweight": packed(codes.T.tolist()), "qzeros": packed(zeros.T.tolist()), "scales": scales}
    group_of = torch.arange(128) // (group or 128)
    expected = ((codes - zeros[:, group_of]) * scales.double().T[:, group_of]).half()
    config = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]}
    specs = {f"layers.0.up_proj.{name}": tensor for name, tensor in tensors.items()}
    model = Checkpoint.from_tensors({**specs, "norm.weight": torch.ones(4)}, "m")
    model = Checkpoint(model.label, model.source, {"config.json": b"{}"}).with_config(quantization_config=config)
    dense = dequantize(model)
    assert torch.equal(dense.read("layers.0.up_proj.weight"), expected)
    assert dense.config == {}
    assert read_config(model.config)("visual.0.fc1") is None


def test_what_awq_and_gptq_cannot_be_read_as_is_refused() -> None:
    for found, reason in (
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq of 4 bits in the version 'gemv'"),
        ({"quant_method": "gptq", "bits": 5}, "gptq of 5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in the format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "packed in int16"),
    ):
        with pytest.raises(CheckpointError, match=f"{reason}.*Start from the model"):
            stored_as({"quantization_config": found})


def test_tensors_that_are_not_what_the_config_implies_are_refused_before_they_are_read() -> None:
    model = quantize(Checkpoint.from_tensors({"layers.0.up_proj.weight": a_weight()}, "m"), Scheme(4, 32), format_name="gptq")
    tensors = {name: model.read(name) for name in model.specs}
    for name, tensor, reason in (
        ("qweight", tensors["layers.0.up_proj.qweight"].float(), r"qweight is F32 \[16, 64\], but .* makes it I32 \[16, 64\]"),
        ("scales", tensors["layers.0.up_proj.scales"][:2], r"scales is F16 \[2, 64\], but 4 bits, groups of 32, .* \[64, 128\] makes it F16 \[4, 64\]"),
        ("qweight", torch.zeros(3, dtype=torch.int32), "layers.0.up_proj is stored as gptq by config.json, but its tensors are no matrices"),
    ):
        other = Checkpoint.from_tensors({**tensors, f"layers.0.up_proj.{name}": tensor}, "m")
        with pytest.raises(CheckpointError, match=reason):
            dequantize(Checkpoint("m", other.source, model.files))


def llama(scheme: Scheme) -> dict[str, Scheme]:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return {f"model.layers.{block}.{part}": scheme for block in range(12) for part in parts}


def test_one_scheme_is_written_out() -> None:
    assert FORMATS["gptq"].config(llama(Scheme(4, 128)), ["lm_head"]) == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False, "true_sequential": True,
        "static_groups": False, "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    assert FORMATS["gptq"].config({}, ["lm_head"]) is None


def test_several_schemes_are_rules_that_match_what_servers_fuse_too() -> None:
    layers = llama(Scheme(4, 128)) | {f"model.layers.{block}.self_attn.{name}_proj": Scheme(8, 0) for block in (0, 3) for name in "qkv"}
    del layers["model.layers.11.mlp.down_proj"]
    written: Any = FORMATS["gptq_v2"].config(layers, ["lm_head", "model.layers.11.mlp.down_proj"])
    assert written["dynamic"] == {
        r"+:model\.layers\.(?:0|3)\.self_attn\.q_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"+:model\.layers\.(?:0|3)\.self_attn\.qkv_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"+:model\.layers\.(?:0|3)\.self_attn\.k_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"+:model\.layers\.(?:0|3)\.self_attn\.v_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:model\.layers\.(?:11)\.mlp\.down_proj$": {},
    }
    lookup = read_config({"quantization_config": written})
    assert {module: lookup(module) for module in llama(Scheme())} == {module: layers.get(module) for module in llama(Scheme())}


def test_what_it_cannot_hold_is_refused_by_the_plan() -> None:
    model = Checkpoint.from_tensors({"layers.0.up_proj.weight": a_weight(), "layers.1.up_proj.weight": a_weight()}, "m")
    for scheme, reason in (
        (Scheme(5, 32), "integers of 2, 3, 4 and 8 bits, not 5 bits"),
        (Scheme(4, 8), "not of 8"),
        (Scheme(4, 32, False), "version 1 stores zero points less one, and cannot hold 0; write gptq_v2, or symmetric codes"),
    ):
        with pytest.raises(OptionError, match=f"format gptq: .*{reason}"):
            quantize(model, scheme, format_name="gptq")
    odd = Checkpoint.from_tensors({"layers.0.up_proj.weight": a_weight(24, 64)}, "m")
    with pytest.raises(OptionError, match=r"layers.0.up_proj.weight is \[24, 64\], and gptq stores 32 outputs and inputs at a time; leave it out"):
        quantize(odd, Scheme(3, 32), format_name="gptq")
    four = dequantize(quantize(odd, Scheme(4, 32), format_name="gptq"))
    assert torch.equal(four.read("layers.0.up_proj.weight"), values_of(rtn(a_weight(24, 64), Scheme(4, 32))))


def test_codes_are_chosen_against_the_scales_as_stored() -> None:
    """A bfloat16 weight has float16 scales here: the codes are those of the nearest multiples of just these scales."""
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / 50).to(torch.bfloat16)
    model = Checkpoint.from_tensors({"layers.0.up_proj.weight": weight}, "m")
    result = quantize(model, Scheme(8, 32), "rtn", {"clip": 0}, "gptq")
    assert {name.rpartition(".")[2] for name in result.specs} == {"qweight", "qzeros", "scales", "g_idx"}
    scale = result.read("layers.0.up_proj.scales").T.double().unsqueeze(-1)  # [out, groups, 1]
    nearest = (weight.double().view(64, 4, 32) / scale).round().clamp(-128, 127) * scale
    assert torch.equal(dequantize(result).read("layers.0.up_proj.weight"), nearest.flatten(1).half())
    assert result.files["quantize_config.json"] is not None
    assert "quantize_config.json" not in dequantize(result).files


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    model = Checkpoint.from_tensors({"layers.0.up_proj.weight": torch.full((32, 32), 1e6, dtype=torch.bfloat16)}, "m")
    with pytest.raises(CheckpointError, match=r"m: layers.0.up_proj.weight holds values that F16 cannot, in which gptq stores scales"):
        quantize(model, Scheme(4, 32), format_name="gptq").read("layers.0.up_proj.qweight")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_gptqmodel_packs_the_same_words_and_its_files_are_read(bits: int, symmetric: bool) -> None:
    scheme, start = Scheme(bits, 32, symmetric), f"{bits}.{'symmetric' if symmetric else 'asymmetric'}."
    golden = {name.removeprefix(start): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(start)}
    codes, zeros = ((golden[name].int() + scheme.low).to(torch.int8) for name in ("codes", "zeros"))
    quantized = Quantized(codes, golden["scales"].T.contiguous(), None if symmetric else zeros, bits)
    files = {version: {**golden, "qzeros": golden[f"qzeros_{version}"]} for version in ("v1", "v2")}
    ours = FORMATS["gptq_v2"].encode(quantized)
    assert all(torch.equal(tensor, files["v2"][name]) for name, tensor in ours.items())
    if symmetric:
        assert all(torch.equal(tensor, files["v1"][name]) for name, tensor in FORMATS["gptq"].encode(quantized).items())
    for layout, version in (("gptq", "v1"), ("gptq_v2", "v2")):
        found = READERS[layout].decode(files[version], scheme, (32, 64))
        assert torch.equal(found.codes, codes)
        assert symmetric or torch.equal(found.zero_point, zeros)
