"""AdaQuant: it begins bit for bit where round to nearest ends, its gradients are those of autograd, and it never ends worse."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of, same
from torch import Tensor

from mergekit_plus.moments import Moments
from quant import QUANTIZERS, Quantized, Scheme, adaquant, dequantize, gptq, rtn
from quant.adaquant import loss_and_gradients
from quant.gram import damped

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32) for symmetric in (True, False)]


def errors(weight: Tensor, quantized: Quantized, moments: Moments) -> Tensor:
    """The damped loss of each row, float64."""
    e = weight.double() - dequantize(quantized).double()
    return (e @ damped(moments.gram, 0.01).double() * e).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_before_the_first_step_it_is_round_to_nearest_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    weight, moments = a_weight(9, 96, dtype), moments_of(a_text(96))
    assert same(adaquant(weight, scheme, moments, steps=0), rtn(weight, scheme))
    assert same(adaquant(weight, scheme, moments, steps=0, start="gptq"), gptq(weight, scheme, moments))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_no_row_ends_with_more_error_than_it_began_with(scheme: Scheme, start: str) -> None:
    weight, moments = a_weight(9, 96, torch.float32), moments_of(a_text(96))
    first = {"rtn": rtn(weight, scheme), "gptq": gptq(weight, scheme, moments)}[start]
    found = adaquant(weight, scheme, moments, steps=20, start=start)
    assert bool((errors(weight, found, moments) <= errors(weight, first, moments) * (1 + 1e-5)).all())
    assert scheme.low <= int(found.codes.min())
    assert int(found.codes.max()) <= scheme.high


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(3, 32, False), Scheme(4, 0)], ids=str)
def test_it_takes_a_third_of_the_error_off(scheme: Scheme) -> None:
    weight, moments = a_weight(16, 96, torch.float32), moments_of(a_text(96))
    found = adaquant(weight, scheme, moments, steps=100)
    assert float(errors(weight, found, moments).sum()) < 0.67 * float(errors(weight, rtn(weight, scheme), moments).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradients_are_those_of_autograd_with_roundings_passed_straight_through(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(3, 16, symmetric)
    target = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    gram = moments_of(a_text(32)).gram.double()
    unit = torch.rand(5, 2, 1, generator=generator, dtype=torch.float64) + 0.1
    x = (torch.randn(5, 2, 16, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    relative = (torch.rand(5, 2, 1, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    zero = torch.rand(5, 2, 1, generator=generator, dtype=torch.float64).mul(2).sub(1).mul(0 if symmetric else 1).requires_grad_()

    def straight(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    scale = unit * relative
    codes = (straight(x * unit / scale) + straight(zero)).clamp(scheme.low, scheme.high)
    error = target - ((codes - straight(zero)) * scale).flatten(1)
    loss = ((error @ gram) * error).sum()
    by_hand = torch.autograd.grad(loss, (x, relative, zero))
    found, gradients, found_codes = loss_and_gradients(target, x.detach(), unit, scale.detach(), zero.detach(), gram, scheme)
    torch.testing.assert_close(found.sum(), loss.detach())
    assert torch.equal(found_codes, codes.detach().round())
    for mine, theirs in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 0, False)], ids=str)
def test_a_power_of_two_moves_the_scales_and_nothing_else(scheme: Scheme) -> None:
    weight, moments = a_weight(8, 64), moments_of(a_text(64))
    one = adaquant(weight, scheme, moments, steps=30)
    for factor in (2.0**-8, 2.0**8):
        two = adaquant(weight * factor, scheme, moments, steps=30)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale * factor, two.scale)


def test_rows_do_not_know_each_other() -> None:
    weight, moments = a_weight(16, 64), moments_of(a_text(64))
    turned = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    whole, other = adaquant(weight, Scheme(3, 32), moments, steps=30), adaquant(weight[turned], Scheme(3, 32), moments, steps=30)
    assert torch.equal(whole.codes[turned], other.codes)


def test_zero_points_stay_whole_so_that_zero_is_kept_exactly() -> None:
    weight, moments = a_weight(8, 64), moments_of(a_text(64))
    weight[:, 5] = 0
    found = adaquant(weight, Scheme(4, 32, False), moments, steps=30)
    assert found.zero_point is not None
    assert found.zero_point.dtype == torch.int8
    at_zero = Quantized(found.zero_point.repeat_interleave(32, 1), found.scale, found.zero_point, 4)
    assert bool((dequantize(at_zero) == 0).all())


def test_rows_of_zeros_and_inputs_that_never_come_are_kept() -> None:
    weight, x = a_weight(4, 64), a_text(64)
    weight[1], x[:, 3] = 0, 0
    found = dequantize(adaquant(weight, Scheme(4, 32), moments_of(x), steps=20))
    assert bool((found[1] == 0).all())
    assert bool(found.isfinite().all())


def test_it_is_found_by_name_as_a_calibrated_quantiser() -> None:
    assert QUANTIZERS["adaquant"].calibrated
    assert list(QUANTIZERS["adaquant"].options.table) == ["steps", "lr", "scale_lr", "start", "damp", "clip"]
