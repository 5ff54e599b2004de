"""Every scheme through every format; compressed-tensors' own decoder is the judge of pack-quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme

from mergekit_plus.checkpoint.dtypes import TAGS
from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.errors import CheckpointError, OptionError
from quant import FORMATS, Quantized, Scheme, decode, dequantize, rtn
from quant.formats.config import config

PACKED = FORMATS["pack-quantized"]
SCHEMES = [Scheme(bits, group, symmetric) for bits in range(2, 9) for group in (0, 32, 64, 128) for symmetric in (True, False)]


def a_weight(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)).to(dtype)


def theirs(tensors: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight as compressed-tensors decodes it."""
    written: Any = config({"layer": scheme}, [])
    group = QuantizationScheme.model_validate(written["config_groups"]["group_0"])
    return PackedQuantizationCompressor.decompress(tensors, group)["weight"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compressed_tensors_decodes_the_very_bits_of_dequantize(scheme: Scheme, dtype: torch.dtype) -> None:
    for rows in (1, 7, 33, 64):
        weight = a_weight(rows, 256, dtype)
        quantized = rtn(weight, scheme, clip=1)
        spec = TensorSpec("up.weight", TAGS[dtype], (rows, 256))
        tensors = {**PACKED.encode(quantized), **PACKED.fixed(spec)}
        expected = dequantize(quantized)
        assert expected.dtype == dtype
        assert torch.equal(theirs(tensors, scheme), expected)
        back = decode(tensors, scheme, (rows, 256))
        assert torch.equal(back.codes, quantized.codes)
        assert torch.equal(dequantize(back), expected)
        written = [TensorSpec(f"up.{name}", TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
        assert sorted(written, key=str) == sorted(PACKED.specs(spec, scheme), key=str)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_width_that_fills_no_word_is_read_as_well(bits: int) -> None:
    scheme = Scheme(bits, 0, False)
    quantized = rtn(a_weight(5, 77), scheme)
    tensors = {**PACKED.encode(quantized), **PACKED.fixed(TensorSpec("weight", "BF16", (5, 77)))}
    assert torch.equal(theirs(tensors, scheme), dequantize(quantized))
    assert torch.equal(dequantize(decode(tensors, scheme, (5, 77))), dequantize(quantized))


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 64, False), Scheme(5, 0, False), Scheme(8, 0)], ids=str)
def test_rows_that_begin_at_a_row_unit_are_packed_as_in_the_whole(scheme: Scheme) -> None:
    weight = a_weight(101, 128)
    whole = PACKED.encode(rtn(weight, scheme))
    unit = PACKED.row_unit(scheme)
    cuts = [0, unit, 3 * unit, 101]
    pieces = [PACKED.encode(rtn(weight[first:last], scheme)) for first, last in zip(cuts, cuts[1:], strict=False)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)


def test_what_the_plan_says_is_written_out() -> None:
    spec = TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (33, 96))
    prefix = "model.layers.0.mlp.up_proj."
    assert PACKED.specs(spec, Scheme(3, 32, False)) == (
        TensorSpec(f"{prefix}weight_packed", "I32", (33, 9)),
        TensorSpec(f"{prefix}weight_scale", "BF16", (33, 3)),
        TensorSpec(f"{prefix}weight_shape", "I64", (2,)),
        TensorSpec(f"{prefix}weight_zero_point", "I32", (4, 3)),
    )
    assert PACKED.fixed(spec)["weight_shape"].tolist() == [33, 96]
    assert [found.name for found in PACKED.specs(TensorSpec("weight", "F16", (2, 8)), Scheme(4, 0))] == [
        "weight_packed",
        "weight_scale",
        "weight_shape",
    ]


def test_what_cannot_be_packed_is_refused_by_the_plan() -> None:
    with pytest.raises(OptionError, match=r"experts\.gate_up_proj: pack-quantized stores the `weight` of a module only"):
        PACKED.specs(TensorSpec("experts.gate_up_proj", "BF16", (4, 64)), Scheme(4, 32))
    with pytest.raises(OptionError, match="groups of 128 do not divide"):
        PACKED.specs(TensorSpec("up.weight", "BF16", (4, 64)), Scheme(4, 128))


def test_tensors_that_are_not_what_the_scheme_implies_are_refused() -> None:
    scheme = Scheme(4, 32, False)
    tensors = PACKED.encode(rtn(a_weight(4, 64), scheme))
    with pytest.raises(CheckpointError, match="weight_zero_point is missing"):
        decode({name: tensor for name, tensor in tensors.items() if name != "weight_zero_point"}, scheme, (4, 64))
    with pytest.raises(CheckpointError, match=r"weight_packed is int32 \[4, 8\], but .* makes it \[4, 16\]"):
        decode(tensors, scheme, (4, 128))
    with pytest.raises(CheckpointError, match="weight_packed is float32"):
        decode({**tensors, "weight_packed": tensors["weight_packed"].float()}, scheme, (4, 64))


def test_codes_beyond_their_width_do_not_reach_their_neighbours() -> None:
    """A caller's NaN becomes any code; it must stay where it is."""
    codes = torch.tensor([[-128, 7, 127, -8, 0, 0, 0, 0]], dtype=torch.int8)
    found = decode(PACKED.encode(Quantized(codes, torch.ones(1, 1), None, 4)), Scheme(4, 0), (1, 8)).codes
    assert found[0, 1] == 7
    assert found[0, 3:].tolist() == [-8, 0, 0, 0, 0]


def test_dense_is_the_dequantised_weight_under_its_own_name_and_no_config() -> None:
    dense, scheme = FORMATS["dense"], Scheme(4, 32)
    spec = TensorSpec("up.weight", "BF16", (3, 64))
    quantized = rtn(a_weight(3, 64), scheme)
    assert dense.specs(spec, scheme) == (spec,)
    assert torch.equal(dense.encode(quantized)["weight"], dequantize(quantized))
    assert dense.fixed(spec) == {}
    assert dense.row_unit(scheme) == 1
    assert dense.config({"up": scheme}, []) is None


def test_the_formats_are_known_by_name() -> None:
    assert list(FORMATS) == [
        "dense", "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "gptq", "gptq_v2",
    ]  # fmt: skip
    with pytest.raises(OptionError, match=r"unknown format 'packed-quantized'\. Did you mean 'pack-quantized'\?"):
        FORMATS["packed-quantized"]
