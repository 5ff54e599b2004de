"""What the Gram matrix says, against the outputs themselves in float64."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of, output_error

from mergekit_plus.errors import CheckpointError
from quant import Scheme, dequantize, rtn
from quant.gram import factor, towards_dense


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, weight = a_text(64), a_weight(16, 64)
    quantized = rtn(weight, Scheme(3, 32))
    by_hand = (x.double() @ (weight.double() - dequantize(quantized).double()).T).square().sum(-1).mean()
    torch.testing.assert_close(output_error(weight, quantized, moments_of(x)), float(by_hand), rtol=1e-5, atol=0)


def test_behind_layers_that_err_it_differs_from_the_error_for_the_dense_output_by_a_constant() -> None:
    dense = a_text(64)
    now, weight = dense + 0.3 * a_text(64, seed=1), a_weight(16, 64)
    moments = moments_of(now, dense)
    rest = []
    for bits in (2, 4):
        quantized = rtn(weight, Scheme(bits, 32))
        by_hand = (dense.double() @ weight.double().T - now.double() @ dequantize(quantized).double().T).square().sum(-1).mean()
        rest.append(float(by_hand) - output_error(weight, quantized, moments))
    torch.testing.assert_close(*rest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_factor_is_upper_triangular_and_its_square_the_matrix(width: int) -> None:
    gram = moments_of(a_text(width)).gram
    root, damp = factor(gram, 0.0)
    assert damp == 0
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.double() @ root.double().T, gram.double(), rtol=1e-5, atol=1e-6)
    root, _ = factor(gram, 0.01)
    torch.testing.assert_close(root.double() @ root.double().T, gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(width), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(CheckpointError, match="inputs of the layer are NaN or infinite"):
        factor(torch.full((2, 2), torch.nan), 0.01)


@pytest.mark.parametrize("damp", [0.0, 0.01, 0.1])
def test_the_weight_for_the_dense_output_is_that_of_least_squares(damp: float) -> None:
    dense = a_text(24, tokens=500)
    now, weight = dense + 0.3 * a_text(24, tokens=500, seed=1), a_weight(6, 24, torch.float32)
    moments = moments_of(now, dense)
    # the penalty as more rows: sqrt(damp * mean power) * (V - W) = 0
    extra = (damp * moments.gram.diagonal().mean() * 500).sqrt().double() * torch.eye(24, dtype=torch.float64)
    rows = torch.cat([now.double(), extra])
    wanted = torch.cat([dense.double() @ weight.double().T, extra @ weight.double().T])
    by_hand = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(towards_dense(weight, moments, damp).double(), by_hand, rtol=1e-4, atol=1e-6)
    assert torch.equal(towards_dense(weight, moments_of(now), damp), weight)
    same_inputs = moments_of(dense, dense)
    torch.testing.assert_close(towards_dense(weight, same_inputs, damp), weight, rtol=1e-4, atol=1e-6)
