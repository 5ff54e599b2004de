"""Statistics tuning against the outputs themselves, in float64: least squares beats nothing and variance matching, and means come out right."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of, same
from torch import Tensor

from quant import Quantized, Scheme, dequantize, gptq, rtn
from quant.tuning import bias_correction, centred, rescale_rows

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32) for symmetric in (True, False)]


def outputs(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def squared(x: Tensor, weight: Tensor, quantized: Tensor) -> Tensor:
    """The mean squared error of each output."""
    return (outputs(x, weight) - outputs(x, quantized)).square().mean(0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rescaled_rows_keep_their_codes_and_are_no_worse_than_they_were_or_with_their_variance_matched(scheme: Scheme) -> None:
    x, weight = a_text(64), a_weight(12, 64, torch.float32)
    before = rtn(weight, scheme)
    after = rescale_rows(weight, before, moments_of(x))
    assert torch.equal(after.codes, before.codes)
    assert after.zero_point is before.zero_point
    was, now = dequantize(before), dequantize(after)
    matched = was * (outputs(x, weight).std(0) / outputs(x, was).std(0)).unsqueeze(-1)
    least = squared(x, weight, now)
    assert bool((least <= squared(x, weight, was) * (1 + 1e-6)).all())
    assert bool((least <= squared(x, weight, matched) * (1 + 1e-4)).all())


def test_the_factor_is_that_of_least_squares() -> None:
    x, weight = a_text(64), a_weight(3, 64, torch.float32)
    before = rtn(weight, Scheme(2, 32))
    after = rescale_rows(weight, before, moments_of(x))
    y, found = outputs(x, weight), outputs(x, dequantize(before))
    for row in range(3):
        factor = torch.linalg.lstsq(found[:, row : row + 1], y[:, row : row + 1]).solution[0, 0]
        torch.testing.assert_close(after.scale[row].double(), before.scale[row].double() * factor, rtol=1e-5, atol=0)


def test_behind_layers_that_err_the_factor_is_for_the_output_of_the_dense_model() -> None:
    dense = a_text(64)
    now, weight = dense + 0.3 * a_text(64, seed=1), a_weight(3, 64, torch.float32)
    before = rtn(weight, Scheme(3, 32))
    after = rescale_rows(weight, before, moments_of(now, dense))
    y, found = outputs(dense, weight), outputs(now, dequantize(before))
    factor = (y * found).sum(0) / (found * found).sum(0)
    torch.testing.assert_close(after.scale.double(), before.scale.double() * factor.unsqueeze(-1), rtol=1e-5, atol=0)


def test_what_is_right_already_and_rows_of_zeros_are_left_alone() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -8.0], [0.0, 0.0, 0.0, 0.0]])
    exact = rtn(weight, Scheme(4, 0), clip=0)
    assert torch.equal(dequantize(exact), weight)
    assert same(rescale_rows(weight, exact, moments_of(a_text(4))), exact)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_corrected_bias_gives_every_output_the_mean_of_the_dense_one(scheme: Scheme) -> None:
    x, weight = a_text(64), a_weight(12, 64)
    quantized = rtn(weight, scheme)
    mean = (outputs(x, dequantize(quantized)) + bias_correction(weight, quantized, moments_of(x)).double()).mean(0)
    torch.testing.assert_close(mean, outputs(x, weight).mean(0), rtol=0, atol=1e-6)


def test_with_a_bias_to_be_corrected_the_covariance_is_what_to_quantise_by() -> None:
    x, weight, scheme = a_text(64) + 1, a_weight(32, 64), Scheme(2, 32)
    moments = moments_of(x)

    def error(quantized: Quantized) -> float:
        bias = bias_correction(weight, quantized, moments).double()
        return float((outputs(x, weight) - outputs(x, dequantize(quantized)) - bias).square().sum(-1).mean())

    y = x.double() - x.double().mean(0)
    torch.testing.assert_close(centred(moments).gram.double(), y.T @ y / len(x), rtol=0, atol=1e-4)
    assert error(gptq(weight, scheme, centred(moments))) < error(gptq(weight, scheme, moments))


def test_moments_of_two_models_cannot_be_centred() -> None:
    with pytest.raises(ValueError, match="lack the mean of the dense inputs"):
        centred(moments_of(a_text(8), a_text(8, seed=1)))
