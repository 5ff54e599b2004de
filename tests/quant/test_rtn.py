"""Round to nearest: the definition in float64, what the search may and may not do, and the corners of the number formats."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_toys import a_weight, real_weights, same
from torch import Tensor

from quant import QUANTIZERS, Quantized, Scheme, dequantize, rtn

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SCHEMES = [Scheme(bits, group, symmetric) for bits in range(2, 9) for group in (0, 32, 128) for symmetric in (True, False)]


def grouped(tensor: Tensor, scheme: Scheme) -> Tensor:
    """[rows, groups, group] in float64."""
    return tensor.double().unflatten(-1, (scheme.groups(tensor.shape[-1]), -1))


def error(weight: Tensor, quantized: Quantized) -> float:
    """The relative squared error."""
    return float(((weight.double() - dequantize(quantized).double()) ** 2).sum() / (weight.double() ** 2).sum())


def test_the_extreme_goes_to_the_code_that_has_no_counterpart_whatever_its_sign() -> None:
    weight = torch.tensor([[-8.0, 7.0, 1.0, 0.4], [8.0, -7.0, -1.0, 0.6]])
    quantized = rtn(weight, Scheme(4, 0), clip=0)
    assert quantized.scale.tolist() == [[1.0], [-1.0]]
    assert quantized.codes.tolist() == [[-8, 7, 1, 0], [-8, 7, 1, -1]]
    assert quantized.zero_point is None


def test_asymmetric_codes_span_the_range_and_hold_zero_exactly() -> None:
    quantized = rtn(torch.tensor([[-1.0, 2.0, 0.0, 0.9], [4.0, 5.0, 6.0, 3.1]]), Scheme(2, 0, False), clip=0)
    assert quantized.scale.tolist() == [[1.0], [2.0]]
    assert quantized.zero_point is not None
    assert quantized.zero_point.tolist() == [[-1], [-2]]
    assert dequantize(quantized).tolist() == [[-1.0, 2.0, 0.0, 1.0], [4.0, 4.0, 6.0, 4.0]]


def test_halves_go_to_the_even_code() -> None:
    assert rtn(torch.tensor([[-8.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), Scheme(4, 0), clip=0).codes.tolist() == [[-8, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_plain_min_max_is_the_definition_in_float64(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = a_weight(7, 256, dtype)
    quantized = rtn(weight, scheme, clip=0)
    x = grouped(weight, scheme)
    if scheme.symmetric:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale, zero = torch.where(high > -low, high, low) / scheme.low, torch.zeros(())
    else:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / (2**scheme.bits - 1)
        zero = torch.round(scheme.low - low / scale)
    stored = scale.to(torch.float32).to(dtype)
    codes = torch.round(x / stored.double()) + zero
    assert quantized.scale.dtype == dtype
    torch.testing.assert_close(quantized.scale, stored.squeeze(-1), rtol=max(2.0**-22, torch.finfo(dtype).eps), atol=0)
    # where float32 and float64 round the scale or the zero point to neighbours, the codes may differ too
    near = (quantized.scale == stored.squeeze(-1)).unsqueeze(-1)
    if quantized.zero_point is not None:
        half = ((low / scale).frac().abs() - 0.5).abs() < 1e-5
        assert bool(((quantized.zero_point.unsqueeze(-1) == zero) | half).all())
        near &= quantized.zero_point.unsqueeze(-1) == zero
    differ = (grouped(quantized.codes, scheme) != codes.clamp(scheme.low, scheme.high)) & near
    assert int(differ.sum()) <= (1 if dtype in (torch.float32, torch.float64) else 0)  # a quotient next to a half


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("clip", [0, 1, 6])
def test_each_row_is_quantised_alike_in_any_company(scheme: Scheme, clip: int) -> None:
    weight = a_weight(33, 640 if scheme.group_size else 613)
    whole = rtn(weight, scheme, clip=clip)
    for first, last in ((0, 1), (1, 2), (2, 19), (32, 33)):
        assert same(rtn(weight[first:last], scheme, clip=clip), whole.rows(slice(first, last)))
    shuffled = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rtn(weight[shuffled], scheme, clip=clip).codes, whole.codes[shuffled])


def test_neither_threads_nor_blocks_nor_very_long_rows_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = a_weight(3, 1 << 17), Scheme(4, 0)
    whole = rtn(weight, scheme)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4 if threads == 1 else 1)
        assert same(rtn(weight, scheme), whole)
        for row in range(3):
            assert same(rtn(weight[row : row + 1], scheme), whole.rows(slice(row, row + 1)))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(sys.modules["quant.rtn"], "BLOCK", 1 << 10)
    assert same(rtn(weight, scheme), whole)


def test_the_weight_is_left_as_it_was() -> None:
    weight = a_weight(4, 64, torch.float32)
    before = weight.clone()
    rtn(weight, Scheme(4, 32))
    rtn(weight.T.contiguous().T, Scheme(4, 32, False))
    assert torch.equal(weight, before)


def test_a_weight_that_is_a_view_is_quantised_like_its_copy() -> None:
    weight = a_weight(64, 128)[:, 32:96]
    assert same(rtn(weight, Scheme(4, 32)), rtn(weight.contiguous(), Scheme(4, 32)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_never_turns_a_group_further_away(scheme: Scheme) -> None:
    """The direction of the codes is what it chooses by; rounding the scale may cost what rounding a scale costs."""
    weight = a_weight(16, 256, torch.float32)
    x = grouped(weight, scheme)
    found = [grouped(dequantize(rtn(weight, scheme, clip=clip)), scheme) for clip in (0, 1, 6)]
    plain, little, much = (torch.cosine_similarity(x, value, dim=-1) for value in found)
    assert bool((little >= plain - 1e-6).all())
    assert bool((much >= plain - 1e-6).all())
    assert float(much.mean()) > float(plain.mean())


@pytest.mark.parametrize("scheme", [Scheme(bits, 64, symmetric) for bits in (2, 3, 4, 5, 6, 8) for symmetric in (True, False)], ids=str)
def test_the_searched_weight_has_the_projection_of_the_weight_and_less_error(scheme: Scheme) -> None:
    for weight in real_weights()[:3]:
        quantized = rtn(weight, scheme)
        x, value = grouped(weight, scheme), grouped(dequantize(quantized), scheme)
        projection = (x * value).sum(-1) / (x * x).sum(-1)
        assert abs(float(projection.mean()) - 1) < 0.001
        assert float((projection - 1).abs().mean()) < 0.003  # the rounding of a bfloat16 scale, and what codes change with it
        assert error(weight, quantized) < error(weight, rtn(weight, scheme, clip=0))


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.85), (4, 0.93)])
def test_signed_scales_beat_the_usual_convention_on_real_weights(bits: int, gain: float) -> None:
    scheme = Scheme(bits, 128)
    ours = usual = 0.0
    for weight in real_weights():
        x = grouped(weight, scheme)
        scale = (x.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).to(torch.bfloat16).double()
        usual += float(((x - (x / scale).round().clamp(scheme.low, scheme.high) * scale) ** 2).sum())
        ours += float(((x - grouped(dequantize(rtn(weight, scheme, clip=0)), scheme)) ** 2).sum())
    assert ours < gain * usual


@given(st.integers(-10, 10), st.sampled_from(SCHEMES), st.integers(0, 7), st.integers(0, 2**16))
def test_a_power_of_two_moves_the_scales_and_nothing_else(power: int, scheme: Scheme, clip: int, seed: int) -> None:
    weight = a_weight(3, 128, seed=seed)
    one, two = rtn(weight, scheme, clip=clip), rtn(weight * 2.0**power, scheme, clip=clip)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale * 2.0**power, two.scale)


@given(st.sampled_from(SCHEMES), st.integers(0, 7), st.integers(0, 2**16))
def test_a_symmetric_weight_and_its_negative_have_the_same_codes(scheme: Scheme, clip: int, seed: int) -> None:
    weight = a_weight(3, 128, seed=seed)
    x = grouped(weight, scheme)
    if scheme.symmetric and not bool((x.amax(-1) == -x.amin(-1)).any()):
        one, two = rtn(weight, scheme, clip=clip), rtn(-weight, scheme, clip=clip)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, -two.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("clip", [0, 6])
def test_corners_have_finite_scales_and_values(scheme: Scheme, dtype: torch.dtype, clip: int) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    rows = {
        "zeros": torch.zeros(128),
        "constant": torch.full((128,), 0.3),
        "minus constant": torch.full((128,), -0.3),
        "largest": torch.full((128,), largest, dtype=torch.float64),
        "both ends": torch.tensor([largest, -largest], dtype=torch.float64).repeat(64),
        "least": torch.full((128,), least),
        "few least": torch.arange(128) * least,
        "one outlier": torch.cat([torch.full((127,), 1e-3), torch.tensor([6e4])]),
        "half zeros": torch.cat([torch.zeros(64), torch.linspace(-1, 1, 64)]),
    }
    weight = torch.stack([row.double().clamp(-largest, largest) for row in rows.values()]).to(dtype)
    assert bool(weight.isfinite().all())
    quantized = rtn(weight, scheme, clip=clip)
    value = dequantize(quantized)
    assert bool(quantized.scale.isfinite().all())
    assert bool((quantized.scale != 0).all())
    assert bool(value.isfinite().all())
    assert int(quantized.codes.min()) >= scheme.low
    assert int(quantized.codes.max()) <= scheme.high
    by_name = dict(zip(rows, value.double(), strict=True))
    exact = dict(zip(rows, weight.double(), strict=True))
    assert bool((by_name["zeros"] == 0).all())
    for name in ("constant", "minus constant", "least"):
        tiny = name == "least" and dtype != torch.float16  # below the smallest scale: zero will do
        expected = torch.zeros_like(exact[name]) if tiny else exact[name]
        torch.testing.assert_close(by_name[name], expected, rtol=0.01, atol=least if name == "least" else 0)
    assert float(by_name["one outlier"][-1]) > 3e4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip", [0, 6])
def test_what_is_not_finite_does_not_crash_nor_touch_other_rows(bad: float, clip: int) -> None:
    for scheme in (Scheme(4, 32), Scheme(3, 0, False)):
        weight = a_weight(3, 64)
        clean = rtn(weight, scheme, clip=clip)
        weight[1, 5] = bad
        assert same(rtn(weight, scheme, clip=clip).rows(slice(2, 3)), clean.rows(slice(2, 3)))


def test_clip_is_a_number_of_ranges() -> None:
    options = QUANTIZERS["rtn"].options
    assert options.check({}) == {"clip": 6}
    assert "greater than or equal to 0" in options.problems({"clip": -1})[0]
    assert "plain min-max" in options.table["clip"].help
