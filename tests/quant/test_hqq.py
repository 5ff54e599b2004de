"""Half-quadratic quantisation: the program of its authors step by step, its own objective, and rows that do not know each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from quant_toys import a_weight, same
from safetensors.torch import load_file
from torch import Tensor

from quant import Quantized, Scheme, dequantize, hqq, rtn
from quant.hqq import BETA, KAPPA, split

GOLDEN = Path(__file__).parent / "golden_hqq.safetensors"  # written by benchmarks/peers/golden_hqq.py
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32, 128) for symmetric in (True, False)]


def losses(weight: Tensor, quantized: Quantized) -> Tensor:
    """The sum of |error|^(3/4) of each group, [rows, groups], in float64."""
    error = weight.double() - dequantize(quantized).double()
    return error.abs().pow(0.75).view(*quantized.scale.shape, -1).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_zero_points_go_the_way_of_the_authors_program(bits: int) -> None:
    golden = load_file(GOLDEN)
    groups, scheme, beta = golden[f"{bits}.groups"], Scheme(bits, 64, False), BETA
    zero = golden[f"{bits}.zeros"][0] + scheme.low
    for codes, after in zip(golden[f"{bits}.codes"], golden[f"{bits}.zeros"][1:], strict=True):
        ours, target, _ = split(groups, torch.ones(6, 1), zero, scheme, beta)
        assert torch.equal(ours - scheme.low, codes.float())
        zero = (ours - target).mean(-1, keepdim=True)
        torch.testing.assert_close(zero - scheme.low, after, rtol=0, atol=1e-5)
        beta *= KAPPA


def test_a_large_error_is_put_down_to_an_outlier_and_a_small_one_is_fitted() -> None:
    x = torch.tensor([[0.0625, 4.0, 1.0]])
    codes, target, loss = split(x, torch.ones(1, 1), torch.zeros(1, 1), Scheme(2, 0), 10.0)
    assert codes.tolist() == [[0, 1, 1]]
    # of an error of 3, 3 - 3^(-1/4) / 10 is left out; all of 1/16, since (1/16)^(-1/4) / 10 = 0.2 is more
    torch.testing.assert_close(target, torch.tensor([[0.0625, 1 + 3**-0.25 / 10, 1.0]]))
    torch.testing.assert_close(loss, torch.tensor([[0.0625**0.75 + 3**0.75]]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_more_steps_never_leave_a_group_worse(scheme: Scheme) -> None:
    weight = a_weight(16, 256, torch.float32)
    plain, few, many = (losses(weight, hqq(weight, scheme, steps=steps)) for steps in (0, 3, 20))
    assert bool((few <= plain * (1 + 1e-5)).all())
    assert bool((many <= few * (1 + 1e-5)).all())
    assert float(many.sum()) < float(plain.sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_steps_are_min_max_and_every_weight_goes_to_its_nearest_code(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = a_weight(5, 256, dtype)
    assert same(hqq(weight, scheme, steps=0), rtn(weight, scheme, clip=0))
    found = hqq(weight, scheme)
    assert found.scale.dtype == dtype
    scale = found.scale.double().unsqueeze(-1)
    zero = torch.zeros_like(scale) if found.zero_point is None else found.zero_point.double().unsqueeze(-1)
    exact = weight.double().view(*found.scale.shape, -1) / scale + zero
    codes = found.codes.double().view_as(exact)
    inside = exact.clamp(scheme.low, scheme.high)
    assert bool(((codes - inside).abs() <= 0.5 + 1e-4).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_row_is_fitted_alike_in_any_company(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = a_weight(17, 640 if scheme.group_size else 613)
    whole = hqq(weight, scheme)
    for first, last in ((0, 1), (1, 2), (2, 11), (16, 17)):
        part = hqq(weight[first:last], scheme)
        assert torch.equal(part.codes, whole.codes[first:last])
        assert torch.equal(part.scale, whole.scale[first:last])
    monkeypatch.setattr(sys.modules["quant.hqq"], "BLOCK", 1 << 11)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        assert same(hqq(weight, scheme), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_power_of_two_moves_the_scales_and_nothing_else() -> None:
    for scheme in SCHEMES:
        weight = a_weight(3, 128)
        one, two = hqq(weight, scheme), hqq(weight * 2.0**9, scheme)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale * 2.0**9, two.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_corners_have_finite_scales_and_values(scheme: Scheme, dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    rows = [
        torch.zeros(128), torch.full((128,), 0.3), torch.full((128,), largest, dtype=torch.float64),
        torch.tensor([largest, -largest], dtype=torch.float64).repeat(64), torch.arange(128) * 2.0**-133,
        torch.cat([torch.full((127,), 1e-3), torch.tensor([6e4])]),
    ]  # fmt: skip
    weight = torch.stack([row.double() for row in rows]).to(dtype)
    quantized = hqq(weight, scheme)
    assert bool(quantized.scale.isfinite().all())
    assert bool((quantized.scale != 0).all())
    assert bool(dequantize(quantized).isfinite().all())
    assert bool((dequantize(quantized)[0] == 0).all())
