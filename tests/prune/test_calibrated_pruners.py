"""Wanda and SparseGPT on the moments of a layer: the released formulas, a float64 reference, and what must not change a mask."""

from __future__ import annotations

import pytest
import torch
from prune_toys import a_weight, moments_of, obs, released_wanda_mask, some_inputs

from mergekit_plus.moments import Moments
from prune import Sparsity, has_pattern, magnitude, sparsegpt, wanda
from prune.masks import lowest_of_rows

HALF = Sparsity.of(0.5)


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    moments = moments_of(torch.tensor([[6.0, 1.0, 0.5, 4.0], [-6.0, -1.0, 0.5, 4.0]]))
    assert wanda(weight, moments=moments).tolist() == [[6.0, 2.0, 1.5, 2.0]]
    assert lowest_of_rows(wanda(weight, moments=moments), HALF).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wandas_masks_are_those_of_the_released_formula(share: float, dtype: torch.dtype) -> None:
    weight, moments = a_weight(33, 96, dtype=dtype), moments_of(some_inputs(500, 96))
    expected = released_wanda_mask(weight.float(), moments.norms, share)
    assert torch.equal(lowest_of_rows(wanda(weight, moments=moments), Sparsity.of(share)), expected)


def test_wanda_with_equal_norms_is_magnitude_by_rows() -> None:
    weight = a_weight(9, 64)
    equal = Moments(3 * torch.eye(64), torch.zeros(64), 10)
    for sparsity in (HALF, Sparsity.of(pattern="2:4")):
        assert torch.equal(lowest_of_rows(wanda(weight, moments=equal), sparsity), lowest_of_rows(magnitude(weight), sparsity))


def test_an_input_that_grows_as_its_weights_shrink_leaves_wandas_mask_as_it_is() -> None:
    weight, samples = a_weight(9, 64), some_inputs(200, 64)
    factors = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(3))
    once, other = wanda(weight, moments=moments_of(samples)), wanda(weight / factors, moments=moments_of(samples * factors))
    assert torch.equal(lowest_of_rows(once, HALF), lowest_of_rows(other, HALF))


@pytest.mark.parametrize("pruner", [wanda, sparsegpt])
def test_a_layer_that_no_token_reached_is_pruned_by_magnitude(pruner: object) -> None:
    weight, empty = a_weight(8, 32), Moments(torch.zeros(32, 32), torch.zeros(32), 0)
    if pruner is wanda:
        assert torch.equal(wanda(weight, moments=empty), weight.abs())
    else:
        pruned = sparsegpt(weight, Sparsity.of(pattern="2:4"), moments=empty)
        assert torch.equal(pruned, weight.masked_fill(lowest_of_rows(weight.abs(), Sparsity.of(pattern="2:4")), 0))


@pytest.mark.parametrize(("columns", "share"), [(16, 0.5), (16, 0.25), (48, 0.75), (128, 0.5)])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(columns: int, share: float) -> None:
    weight, moments = a_weight(20, 48), moments_of(some_inputs(300, 48))
    expected, removed = obs(weight, moments.gram, 0.01, columns, share)
    found = sparsegpt(weight, Sparsity.of(share), moments=moments, columns=columns)
    assert torch.equal(found == 0, removed)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert int((found == 0).sum()) == int(20 * 48 * share)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (1, 3)])
def test_sparsegpt_chooses_n_of_m_from_the_weights_as_they_are_then(pattern: tuple[int, int]) -> None:
    weight, moments = a_weight(20, 48), moments_of(some_inputs(300, 48))
    expected, removed = obs(weight, moments.gram, 0.01, 16, pattern=pattern)
    found = sparsegpt(weight, Sparsity.of(pattern=f"{pattern[0]}:{pattern[1]}"), moments=moments, columns=16)
    assert torch.equal(found == 0, removed)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert has_pattern(found, *pattern)


def test_sparsegpt_makes_up_for_what_it_removes() -> None:
    weight, samples = a_weight(20, 48), some_inputs(300, 48)
    pruned = sparsegpt(weight, HALF, moments=moments_of(samples), columns=16)
    masked = weight.masked_fill(pruned == 0, 0)
    assert float(((pruned - weight) @ samples.T).square().sum()) < 0.8 * float(((masked - weight) @ samples.T).square().sum())


def test_sparsegpt_on_inputs_that_know_nothing_of_each_other_is_magnitude_within_each_block_of_columns() -> None:
    weight = a_weight(10, 64)
    found = sparsegpt(weight, HALF, moments=Moments(torch.eye(64), torch.zeros(64), 100), columns=16)
    for first in range(0, 64, 16):
        block = weight[:, first : first + 16]
        least = block.abs().flatten().sort().values[80]
        assert torch.equal(found[:, first : first + 16], block.masked_fill(block.abs() < least, 0))


@pytest.mark.parametrize("columns", [16, 20, 128])
@pytest.mark.parametrize("rows", [1, 7])
def test_sparsegpt_meets_the_count_exactly_whatever_ties(columns: int, rows: int) -> None:
    weight = torch.ones(rows, 37)
    found = sparsegpt(weight, HALF, moments=Moments(torch.eye(37), torch.zeros(37), 100), columns=columns)
    assert int((found == 0).sum()) == rows * 37 // 2


def test_weights_of_a_dead_input_go_first_and_no_more_than_asked() -> None:
    weight, samples = a_weight(6, 32), some_inputs(100, 32)
    samples[:, [3, 20]] = 0
    found = sparsegpt(weight, HALF, moments=moments_of(samples), columns=32)
    assert found[:, [3, 20]].abs().max() == 0
    assert int((found == 0).sum()) == 96
    little = sparsegpt(weight, Sparsity.of(0.03), moments=moments_of(samples), columns=32)
    assert int((little == 0).sum()) == 5
    assert bool(torch.isfinite(little).all())


def test_fewer_tokens_than_inputs_are_no_harm() -> None:
    found = sparsegpt(a_weight(6, 64), HALF, moments=moments_of(some_inputs(5, 64)))
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("sparsity", [Sparsity.of(0.7), Sparsity.of(pattern="2:4")])
def test_what_is_zero_stays_zero_and_is_counted(sparsity: Sparsity) -> None:
    weight, moments = a_weight(10, 64), moments_of(some_inputs(300, 64))
    sparse = weight.masked_fill(lowest_of_rows(a_weight(10, 64, 5), HALF), 0)
    found = sparsegpt(sparse, sparsity, moments=moments, columns=16)
    assert bool((found[sparse == 0] == 0).all())
    if not sparsity.group:
        assert int((found == 0).sum()) == sparsity.count(640)


def test_the_weight_is_left_alone() -> None:
    weight, moments = a_weight(6, 32), moments_of(some_inputs(100, 32))
    before, gram = weight.clone(), moments.gram.clone()
    sparsegpt(weight, HALF, moments=moments)
    wanda(weight, moments=moments)
    assert torch.equal(weight, before)
    assert torch.equal(moments.gram, gram)
