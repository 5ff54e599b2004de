"""What holds of every calibrated quantiser: what it aims at, and what it does without a text and with pruned weights."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of, same

from mergekit_plus.moments import Moments
from quant import QUANTIZERS, Quantized, Quantizer, Scheme, dequantize, rtn

METHODS = [QUANTIZERS[name] for name in QUANTIZERS if QUANTIZERS[name].calibrated]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def test_there_are_some() -> None:
    assert {method.name for method in METHODS} >= {"adaquant", "gptq"}


@every_method
def test_behind_layers_that_err_it_aims_at_the_output_of_the_dense_model(method: Quantizer) -> None:
    dense = a_text(64)
    now, weight, scheme = dense + 0.3 * a_text(64, seed=1), a_weight(16, 64), Scheme(4, 32)

    def squared(quantized: Quantized) -> float:
        return float(((dense.double() @ weight.double().T - now.double() @ dequantize(quantized).double().T) ** 2).sum(-1).mean())

    assert squared(method.function(weight, scheme, moments_of(now, dense))) < 0.9 * squared(method.function(weight, scheme, moments_of(now)))


@every_method
def test_no_token_at_all_gives_round_to_nearest_and_a_note(method: Quantizer) -> None:
    weight = a_weight(4, 64)
    found = method.function(weight, Scheme(4, 32), Moments(torch.zeros(64, 64), torch.zeros(64), 0))
    assert same(found, rtn(weight, Scheme(4, 32)))
    assert found.note == "no token reached it: rounded to nearest"


@every_method
def test_pruned_weights_stay_zero(method: Quantizer) -> None:
    for scheme in (Scheme(2, 32), Scheme(4, 32, False)):
        weight = a_weight(6, 64)
        weight[:, ::2] = 0
        assert bool((dequantize(method.function(weight, scheme, moments_of(a_text(64))))[:, ::2] == 0).all())
