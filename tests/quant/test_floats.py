"""Weights as FP8 and FP4: the grid and its ties by hand, compressed-tensors' scales and decoder as judges, and what the search gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from quant_toys import real_weights
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.dtypes import TAGS
from mergekit_plus.checkpoint.spec import TensorSpec
from quant import FORMATS, READERS, Scheme, rtn
from quant.floats import FP8, FP8_BLOCK, MXFP4, NVFP4, FloatScheme, QuantizedFloats, float_values, global_scale, round_floats
from quant.formats import AnyScheme
from quant.plan import dequantize

LAYOUTS: dict[AnyScheme, str] = {
    FP8: "float-quantized", FP8_BLOCK: "float-quantized", NVFP4: "nvfp4-pack-quantized", MXFP4: "mxfp4-pack-quantized", Scheme(8, 0): "int-quantized",
}  # fmt: skip
FLOATS = [FP8, FP8_BLOCK, NVFP4, MXFP4]
FINITE = [torch.bfloat16, torch.float16, torch.float32]


def a_weight(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)) / 50).to(dtype)


def quantised(weight: Tensor, scheme: FloatScheme) -> QuantizedFloats:
    return round_floats(weight, scheme, global_scale(float(weight.float().abs().max())) if scheme == NVFP4 else None)


def arguments(scheme: AnyScheme) -> QuantizationScheme:
    """What we write about a scheme, as compressed-tensors reads it."""
    written: Any = FORMATS[LAYOUTS[scheme]].config({"layer": scheme}, [])
    return QuantizationScheme.model_validate(written["config_groups"]["group_0"])


def theirs(tensors: dict[str, Tensor], scheme: AnyScheme) -> Tensor:
    return BaseCompressor.get_value_from_registry(LAYOUTS[scheme]).decompress(tensors, arguments(scheme))["weight"]


def tensors_of(quantized: QuantizedFloats, layout: str) -> dict[str, Tensor]:
    tensors = FORMATS[layout].encode(quantized)
    return tensors if quantized.global_scale is None else {**tensors, "weight_global_scale": quantized.global_scale}


@pytest.mark.parametrize("scheme", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (7, 96), (33, 64), (129, 160), (300, 256)])
@pytest.mark.parametrize("dtype", FINITE)
def test_compressed_tensors_decodes_the_very_bits(scheme: FloatScheme, rows: int, width: int, dtype: torch.dtype) -> None:
    layout, weight = LAYOUTS[scheme], a_weight(rows, width, dtype)
    quantized = quantised(weight, scheme)
    tensors = tensors_of(quantized, layout)
    found = theirs(dict(tensors), scheme)
    back = READERS[layout].values(tensors, scheme, (rows, width))
    assert torch.equal(back, found)
    assert back.dtype == (torch.bfloat16 if scheme.bits == 4 else dtype)
    if dtype == back.dtype:
        assert torch.equal(float_values(quantized), found)
    spec = TensorSpec("up.weight", TAGS[dtype], (rows, width))
    written = [TensorSpec(f"up.{name}", TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert written == list(FORMATS[layout].specs(spec, scheme))
    specs = {name: TensorSpec(name, TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert READERS[layout].shape(specs, tensors.__getitem__, scheme) == (rows, width)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 77), (131, 129)])
def test_eight_bits_have_any_width(rows: int, width: int) -> None:
    for scheme in (FP8, FP8_BLOCK):
        quantized = quantised(a_weight(rows, width), scheme)
        assert torch.equal(theirs(tensors_of(quantized, "float-quantized"), scheme), float_values(quantized))


@pytest.mark.parametrize("dtype", FINITE)
def test_w8a8_is_eight_bits_by_row_a_byte_each(dtype: torch.dtype) -> None:
    weight = a_weight(9, 77, dtype)
    quantized = rtn(weight, Scheme(8, 0))
    tensors = FORMATS["int-quantized"].encode(quantized)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {"weight": (torch.int8, (9, 77)), "weight_scale": (dtype, (9, 1))}
    found = theirs(dict(tensors), Scheme(8, 0))
    assert torch.equal(READERS["int-quantized"].values(tensors, Scheme(8, 0), (9, 77)), found)
    assert arguments(Scheme(8, 0)).input_activations.num_bits == 8
    assert arguments(Scheme(8, 0)).input_activations.dynamic


def test_four_bit_floats_go_to_the_nearest_and_halves_to_the_even_code() -> None:
    row = torch.tensor([[0.0, 0.2, 0.25, 0.26, 0.7, 0.75, 1.25, 1.26, 1.7, 1.75, 2.5, 2.6, 3.4, 3.5, 5.0, 6.0]])
    row = torch.cat([row, -row], -1)
    weight = torch.cat([row, row * 2], -1)  # the same in groups of 32 with another exponent
    values = float_values(round_floats(weight, MXFP4))[:, :32]
    assert values[0, :16].tolist() == [0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 6.0]
    assert torch.equal(values[0, 16:], -values[0, :16])
    assert torch.equal(values, cast_to_fp4(row.clone()))


def test_two_codes_are_a_byte_the_first_in_its_low_half() -> None:
    codes = torch.tensor([[1, 2, 7, 8]], dtype=torch.uint8)
    packed = FORMATS["mxfp4-pack-quantized"].encode(QuantizedFloats(codes, codes, None, MXFP4, torch.bfloat16))["weight_packed"]
    assert packed.tolist() == [[0x21, 0x87]]


def usual(weight: Tensor, scheme: FloatScheme) -> Tensor:
    """The weight with the scales of compressed-tensors, in float64 from there on."""
    groups = weight.float().unflatten(-1, (-1, scheme.inputs))
    above = generate_gparam(weight.float().min(), weight.float().max()) if scheme == NVFP4 else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments(scheme).weights, above)
    worth = torch.exp2(scale.double() - 127) if scheme == MXFP4 and float(scale.max()) > 1 else scale.double()
    worth = (worth / above.double() if above is not None else worth).unsqueeze(-1)
    return (cast_to_fp4((groups / worth).float()) * worth).flatten(-2)


def relative_error(weight: Tensor, value: Tensor) -> float:
    return float(((weight.double() - value.double()) ** 2).sum() / (weight.double() ** 2).sum())


def test_searched_scales_have_less_error_than_those_of_compressed_tensors() -> None:
    for weight in real_weights():
        assert relative_error(weight, float_values(quantised(weight, NVFP4))) < 0.8 * relative_error(weight, usual(weight, NVFP4))


def test_powers_of_two_are_those_of_compressed_tensors() -> None:
    for weight in real_weights():
        assert torch.equal(float_values(quantised(weight, MXFP4)).double(), usual(weight, MXFP4))


def test_the_global_scale_makes_the_largest_group_scale_the_largest_of_e4m3() -> None:
    assert global_scale(2.0).tolist() == [1344.0]
    assert global_scale(0.0).tolist() == [1.0]
    weight = a_weight(8, 64)
    assert torch.equal(global_scale(float(weight.abs().max())), generate_gparam(weight.float().min(), weight.float().max()).view(1))


@pytest.mark.parametrize("scheme", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FINITE)
def test_corners_have_finite_values_and_zeros_stay_zero(scheme: FloatScheme, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max / 2
    outlier = torch.cat([torch.full((127,), 1e-3), torch.tensor([3e4])])
    for row in [torch.zeros(128), torch.full((128,), 0.3), torch.full((128,), -0.3), torch.full((128,), 1e-7), torch.full((128,), largest), outlier]:
        weight = row.expand(3, 128).to(dtype).contiguous()
        values = float_values(quantised(weight, scheme))
        assert bool(values.isfinite().all())
        if not bool(row.any()):
            assert not bool(values.any())
        if float(row[0].abs()) == 0.3:
            torch.testing.assert_close(values, weight, rtol=0.13, atol=0)  # E2M1 has 0.25 between 1 and 1.5


@pytest.mark.parametrize("scheme", [FP8, FP8_BLOCK], ids=str)
def test_zeros_stay_zero_in_float64(scheme: FloatScheme) -> None:
    assert not bool(float_values(round_floats(torch.zeros(3, 128, dtype=torch.float64), scheme)).any())


@pytest.mark.parametrize("scheme", [FP8, NVFP4, MXFP4], ids=str)
def test_each_row_is_rounded_alike_in_any_company(scheme: FloatScheme) -> None:
    weight = a_weight(33, 128)
    above = global_scale(float(weight.abs().max())) if scheme == NVFP4 else None
    whole, part = round_floats(weight, scheme, above), round_floats(weight[7:9], scheme, above)
    assert torch.equal(float_values(whole)[7:9], float_values(part))


def test_a_scheme_says_what_it_does_not_fit() -> None:
    assert FP8.fits((3, 77)) is None
    assert FP8_BLOCK.fits((3, 77)) is None
    assert "groups of 16 do not divide; NVFP4 has no other" in str(NVFP4.fits((3, 24)))
    assert "3 dimensions" in str(FP8.fits((2, 3, 64)))
    assert "empty" in str(FP8.fits((0, 64)))
    assert FORMATS["float-quantized"].refuses(NVFP4) == "it holds FP8 or FP8_BLOCK, not NVFP4"
    assert FORMATS["pack-quantized"].refuses(FP8) == "it holds integers, not FP8"
    assert FORMATS["int-quantized"].refuses(Scheme(8, 0)) is None
    assert "not 4 bits, groups of 128" in str(FORMATS["int-quantized"].refuses(Scheme()))


@pytest.mark.parametrize(
    ("layout", "weights", "extra"),
    [
        ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, {"weight_scale": (9, 1), "weight_zero_point": (9, 1)}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}, {"weight_scale": (1,)}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}, {"weight_scale": (9, 4)}),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {"weight_scale": (9, 1)}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, {"weight_scale": (1,), "input_scale": (1,)}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 24]}, {"weight_scale": (3, 3)}),
    ],
    ids=str,
)
def test_what_others_write_a_byte_a_code_is_read(layout: str, weights: dict[str, Any], extra: dict[str, tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (9, 64), generator=generator).to(torch.int8)
    tensors = {"weight": codes if weights["type"] == "int" else codes.float().to(torch.float8_e4m3fn)}
    for name, shape in extra.items():
        made = torch.randint(-9, 9, shape, generator=generator).to(torch.int8) if "zero" in name else torch.rand(shape, generator=generator).to(torch.bfloat16)
        tensors[name] = made
    group = {"targets": ["Linear"], "format": layout, "weights": weights, "input_activations": {"num_bits": 8} if "input_scale" in extra else None}
    config = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed", "config_groups": {"a": group}, "ignore": ["lm_head"]}
    made_by = Checkpoint.from_tensors({**{f"layers.0.up_proj.{name}": tensor for name, tensor in tensors.items()}, "norm.weight": torch.ones(3)}, "m")
    model = Checkpoint("m", made_by.source, {"config.json": b"{}"}).with_config(quantization_config=config)
    dense = dequantize(model)
    expected = BaseCompressor.get_value_from_registry(layout).decompress(dict(tensors), QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(dense.read("layers.0.up_proj.weight"), expected)
    assert set(dense.specs) == {"layers.0.up_proj.weight", "norm.weight"}
