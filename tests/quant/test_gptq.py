"""GPTQ against the paper's own loop in float64, never worse than round to nearest, and what it does where a text says little."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quant_toys import a_text, a_weight, moments_of, output_error, same
from torch import Tensor

from mergekit_plus.moments import Moments
from quant import QUANTIZERS, Quantized, Scheme, gptq, rtn

SCHEMES = [Scheme(bits, group, symmetric) for bits in range(2, 9) for group in (0, 32, 64, 128) for symmetric in (True, False)]


def nearest(weight: Tensor, grid: Quantized) -> Tensor:
    """The codes nearest to a weight, for the scales and zero points of a quantised one."""
    low, high = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
    steps = weight.double().unflatten(-1, (grid.scale.shape[1], -1)) / grid.scale.double().unsqueeze(-1)
    zero = 0 if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
    return (steps.round() + zero).clamp(low, high).flatten(-2).to(torch.int8)


def as_the_paper_has_it(weight: Tensor, grid: Quantized, gram: Tensor, order: Tensor) -> Tensor:
    """The codes by algorithm 1 of the GPTQ paper, without blocks: feedback by the Cholesky factor of the inverse, in float64."""
    w = weight.double()[:, order].clone()
    size = weight.shape[1] // grid.scale.shape[1]
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram.double()[order][:, order]), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for k, column in enumerate(order.tolist()):
        group = column // size
        one = replace(grid, scale=grid.scale[:, group : group + 1], zero_point=None if grid.zero_point is None else grid.zero_point[:, group : group + 1])
        code = nearest(w[:, k : k + 1], one)
        codes[:, column] = code[:, 0]
        zero = 0 if one.zero_point is None else one.zero_point.double()
        error = (w[:, k] - ((code.double() - zero) * one.scale.double())[:, 0]) / inverse[k, k]
        w[:, k:] -= error.unsqueeze(1) * inverse[k, k:]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_more_error_than_round_to_nearest(scheme: Scheme) -> None:
    weight, moments = a_weight(24, 128), moments_of(a_text(128))
    assert output_error(weight, gptq(weight, scheme, moments), moments) < output_error(weight, rtn(weight, scheme), moments)


@pytest.mark.parametrize("scheme", [Scheme(4, 0), Scheme(3, 0, False), Scheme(2, 0)], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 1), (1, 7), (3, 33), (16, 77), (40, 130)])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_codes_are_those_of_the_paper(rows: int, width: int, scheme: Scheme, act_order: bool) -> None:
    weight, moments = a_weight(rows, width), moments_of(a_text(width))
    found = gptq(weight, scheme, moments, sweeps=0, act_order=act_order)
    power = moments.gram.diagonal()
    order = power.argsort(descending=True) if act_order else torch.arange(width)
    codes = as_the_paper_has_it(weight, found, moments.gram.double() + 0.01 * power.double().mean() * torch.eye(width), order)
    assert int((found.codes != codes).sum()) == 0


def test_groups_are_those_of_the_file_whatever_the_order() -> None:
    weight, moments = a_weight(16, 256), moments_of(a_text(256))
    for scheme in (Scheme(4, 64), Scheme(3, 32, False)):
        found = gptq(weight, scheme, moments, sweeps=0)
        order = moments.gram.diagonal().argsort(descending=True)
        gram = moments.gram.double() + 0.01 * moments.gram.diagonal().double().mean() * torch.eye(256)
        assert int((found.codes != as_the_paper_has_it(weight, found, gram, order)).sum()) == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_are_not_correlated_are_rounded_to_nearest(scheme: Scheme) -> None:
    weight = a_weight(9, 128)
    found = gptq(weight, scheme, Moments(torch.eye(128), torch.zeros(128), 10))
    assert torch.equal(found.codes, nearest(weight, found))


def test_rows_do_not_know_each_other() -> None:
    weight, moments = a_weight(48, 128), moments_of(a_text(128))
    turned = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    for scheme in (Scheme(2, 32), Scheme(4, 0, False)):
        whole, other = gptq(weight, scheme, moments), gptq(weight[turned], scheme, moments)
        assert torch.equal(whole.codes[turned], other.codes)
        assert torch.equal(whole.scale[turned], other.scale)
        assert torch.equal(gptq(weight[5:6], scheme, moments).codes, whole.codes[5:6])


# ---- where a text says little ----


def test_fewer_tokens_than_inputs_are_enough() -> None:
    weight, moments = a_weight(8, 64), moments_of(a_text(64, tokens=5))
    found = gptq(weight, Scheme(3, 32), moments)
    assert output_error(weight, found, moments) < 0.5 * output_error(weight, rtn(weight, Scheme(3, 32)), moments)
    assert found.note == ""


def test_a_gram_matrix_that_cannot_be_factored_has_its_damping_raised_and_a_note_says_so() -> None:
    weight, moments = a_weight(8, 64), moments_of(a_text(64, tokens=5))
    wrong = replace(moments, gram=moments.gram - 0.05 * moments.gram.diagonal().mean() * torch.eye(64))
    assert gptq(weight, Scheme(3, 32), wrong).note == "damping raised from 0.01 to 0.1 to factor the Gram matrix"
    assert gptq(weight, Scheme(3, 32), replace(moments, gram=torch.zeros(64, 64)), damp=0).note == "damping raised from 0 to 1e-06 to factor the Gram matrix"


def test_inputs_that_are_always_zero_change_nothing_for_the_others() -> None:
    weight, x = a_weight(8, 64), a_text(64)
    x[:, [3, 40]] = 0
    for damp in (0.01, 0.0):
        found = gptq(weight, Scheme(4, 32), moments_of(x), damp=damp)
        assert torch.equal(found.codes[:, [3, 40]], nearest(weight, found)[:, [3, 40]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_scales_have_the_dtype_of_the_weight_which_is_left_as_it_was(dtype: torch.dtype) -> None:
    weight, moments = a_weight(8, 64, dtype), moments_of(a_text(64))
    before, gram = weight.clone(), moments.gram.clone()
    found = gptq(weight, Scheme(4, 32), moments)
    assert (found.scale.dtype, found.codes.dtype, found.bits) == (dtype, torch.int8, 4)
    assert torch.equal(weight, before)
    assert torch.equal(moments.gram, gram)


def test_a_weight_that_is_a_view_is_quantised_like_its_copy() -> None:
    weight, moments = a_weight(64, 128)[:, 32:96], moments_of(a_text(64))
    assert same(gptq(weight, Scheme(4, 32), moments), gptq(weight.contiguous(), Scheme(4, 32), moments))


def test_it_is_found_by_name_as_a_calibrated_quantiser() -> None:
    found = QUANTIZERS["gptq"]
    assert found.calibrated
    assert not QUANTIZERS["rtn"].calibrated
    assert found.options.check({}) == {"damp": 0.01, "act_order": True, "sweeps": 4, "clip": 6}
