"""Coordinate descent: each move by its definition in float64, never a move upwards, and where it ends no single code does better."""

from __future__ import annotations

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of
from torch import Tensor

from quant import Quantized, Scheme, dequantize, rtn
from quant.descent import descend
from quant.gram import damped
from quant.rtn import storable

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32) for symmetric in (True, False)]


def a_gram(width: int) -> Tensor:
    return damped(moments_of(a_text(width)).gram, 0.01)


def errors(weight: Tensor, quantized: Quantized, gram: Tensor) -> Tensor:
    """e H e^T of each row, float64."""
    e = weight.double() - dequantize(quantized).double()
    return (e @ gram.double() * e).sum(-1)


def one_sweep_by_definition(weight: Tensor, start: Quantized, gram: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales, in float64: the whole error is worked out anew for every code that a column could have."""
    w, h = weight.double(), gram.double()
    codes, scale = start.codes.double(), start.scale.double().clone()
    zero = torch.zeros_like(scale) if start.zero_point is None else start.zero_point.double()
    size = w.shape[1] // scale.shape[1]

    def values(codes: Tensor, scale: Tensor) -> Tensor:
        return ((codes.unflatten(1, (-1, size)) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    def error(codes: Tensor, scale: Tensor) -> Tensor:
        e = w - values(codes, scale)
        return (e @ h * e).sum(-1)

    for column in range(w.shape[1]):
        group = column // size
        if column % size == 0:
            only = torch.zeros_like(w)
            only[:, column : column + size] = codes[:, column : column + size] - zero[:, group : group + 1]
            e = w - values(codes, scale)
            best = scale[:, group] + ((e @ h * only).sum(-1) / (only @ h * only).sum(-1)).nan_to_num(0)
            moved = scale.clone()
            moved[:, group] = storable(best.float(), scheme, start.scale.dtype).double()
            scale = torch.where((error(codes, moved) < error(codes, scale)).unsqueeze(1), moved, scale)
        tried = []
        for code in range(scheme.low, scheme.high + 1):
            other = codes.clone()
            other[:, column] = code
            tried.append(error(other, scale))
        codes[:, column] = torch.stack(tried).argmin(0).double() + scheme.low
    return codes, scale


@pytest.mark.parametrize("scheme", [Scheme(2, 0), Scheme(3, 0, False), Scheme(4, 7), Scheme(3, 35)], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_a_sweep_is_its_definition(rows: int, scheme: Scheme) -> None:
    weight, gram = a_weight(rows, 70, torch.float32), a_gram(70)
    start = rtn(weight, scheme)
    found = descend(weight, weight == 0, start, gram, scheme, 1)
    codes, scale = one_sweep_by_definition(weight, start, gram, scheme)
    assert torch.equal(found.codes.double(), codes)
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_is_ever_worse_and_codes_and_zero_points_stay_in_range(scheme: Scheme) -> None:
    weight, gram = a_weight(12, 96, torch.float32), a_gram(96)
    found = rtn(weight, scheme)
    for _ in range(3):
        before, found = found, descend(weight, weight == 0, found, gram, scheme, 1)
        assert bool((errors(weight, found, gram) <= errors(weight, before, gram) * (1 + 1e-5)).all())
        assert scheme.low <= int(found.codes.min())
        assert int(found.codes.max()) <= scheme.high
        assert found.zero_point is before.zero_point
        assert found.scale.dtype == weight.dtype


def test_where_it_ends_no_other_code_of_any_column_is_better() -> None:
    weight, gram, scheme = a_weight(4, 64, torch.float32), a_gram(64), Scheme(3, 32)
    found = descend(weight, weight == 0, rtn(weight, scheme), gram, scheme, 50)
    least = errors(weight, found, gram)
    for column in range(64):
        for code in range(scheme.low, scheme.high + 1):
            codes = found.codes.clone()
            codes[:, column] = code
            assert bool((errors(weight, Quantized(codes, found.scale, None, 3), gram) >= least * (1 - 1e-5)).all())
    assert torch.equal(descend(weight, weight == 0, found, gram, scheme, 1).codes, found.codes)


def test_no_sweep_is_the_start() -> None:
    weight = a_weight(4, 64)
    start = rtn(weight, Scheme(4, 32))
    assert descend(weight, weight == 0, start, a_gram(64), Scheme(4, 32), 0) is start


def test_a_group_of_zeros_stays_one() -> None:
    weight = a_weight(4, 64)
    weight[:, :32] = 0
    gram = torch.block_diag(a_gram(32), a_gram(32))
    found = descend(weight, weight == 0, rtn(weight, Scheme(4, 32)), gram, Scheme(4, 32), 2)
    assert bool((dequantize(found)[:, :32] == 0).all())
    assert bool((found.scale != 0).all())


def test_pruned_weights_stay_zero() -> None:
    for scheme in (Scheme(2, 32), Scheme(4, 32, False)):
        weight = a_weight(6, 64)
        weight[:, ::2] = 0
        assert bool((dequantize(descend(weight, weight == 0, rtn(weight, scheme), a_gram(64), scheme, 2))[:, ::2] == 0).all())
