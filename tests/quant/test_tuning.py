"""Corrected biases against the outputs themselves, in float64."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of
from torch import Tensor

from quant import Quantized, Scheme, dequantize, gptq, rtn
from quant.tuning import bias_correction, centred

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32) for symmetric in (True, False)]


def outputs(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


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
