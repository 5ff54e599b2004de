"""`ties`: trim, elect, merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import merge_tensors, near, one, random
from torch import Tensor, tensor, zeros

from mergekit_plus.merge import trim as module
from mergekit_plus.merge.ties import of_tensor
from mergekit_plus.statistics import Cut

TEN = torch.arange(1.0, 11.0)


def task(*values: float) -> Tensor:
    return tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(("density", "kept"), [(0.3, 3), (0.35, 3), (0.29, 2), (0.01, 1), (0.999, 9), (1.0, 10)])
def test_the_largest_int_of_density_times_size_stay_and_at_least_one(density: float, kept: int) -> None:
    assert merge_tensors("ties", zeros(10), TEN, density=density).tolist() == [0.0] * (10 - kept) + list(range(11 - kept, 11))


def test_the_product_is_truncated_as_python_truncates_it() -> None:
    assert int(0.29 * 100) == 28
    assert int((merge_tensors("ties", zeros(100), torch.arange(1.0, 101.0), density=0.29) != 0).sum()) == 28


def test_of_equal_magnitudes_the_first_stay() -> None:
    result = merge_tensors("ties", zeros(10), task(1, -1, 1, 1, -1, 1, 1, 1, 1, 1), density=0.5)
    assert result.tolist() == [1, -1, 1, 1, -1, 0, 0, 0, 0, 0]
    assert merge_tensors("ties", zeros(10), task(3, 1, 1, 1, 1, 2, 1, 1, 1, 1), density=0.5).tolist() == [3, 1, 1, 1, 0, 2, 0, 0, 0, 0]


def test_ties_at_the_cut_are_the_same_ones_for_any_pieces() -> None:
    values = torch.randint(-3, 4, (101, 7), generator=torch.Generator().manual_seed(0)).float()
    whole = merge_tensors("ties", zeros(101, 7), values, density=0.4)
    assert int((whole != 0).sum()) == int(0.4 * 707)
    for rows in (1, 3, 50):
        assert torch.equal(merge_tensors("ties", zeros(101, 7), values, density=0.4, rows=rows), whole)


def test_the_sign_of_the_weighted_sum_wins() -> None:
    models = task(4, 1, -1), task(2, -3, -1)
    torch.testing.assert_close(merge_tensors("ties", zeros(3), *models, weight=[1, 0.5]), task(10 / 3, -3, -1))
    assert merge_tensors("ties", zeros(3), *models, weight=[1, 0.5], normalize=False).tolist() == [5, -1.5, -1.5]


def test_a_sum_of_zero_elects_plus() -> None:
    assert merge_tensors("ties", zeros(2), task(1, -2), task(-1, 2)).tolist() == [1, 2]


def test_zeros_are_not_counted_in_the_mean() -> None:
    assert merge_tensors("ties", zeros(1), task(4), task(0), task(2)).tolist() == [3]


def test_negative_weights_turn_a_task_round() -> None:
    models = task(4, 1, -1, 3), task(2, -3, -1, -1)
    assert merge_tensors("ties", zeros(4), *models, weight=[1, -0.5], normalize=False).tolist() == [4, 2.5, -1, 3.5]
    assert merge_tensors("ties", zeros(4), *models, weight=[1, -0.5]).tolist() == [4, 5, -1, 7]


def test_weights_that_cancel_are_not_divided_by() -> None:
    assert merge_tensors("ties", zeros(1), task(4), task(-2), weight=[1, -1]).tolist() == [6]
    assert merge_tensors("ties", zeros(1), task(4), task(2), weight=0).tolist() == [0]


def test_tiny_weights_are_normalized_like_any_others() -> None:
    torch.testing.assert_close(merge_tensors("ties", zeros(1), task(4), task(2), weight=1e-30), task(3))


def test_rescale_restores_the_sum_of_magnitudes() -> None:
    result = merge_tensors("ties", zeros(10), TEN, density=0.5, rescale=True)
    assert result.tolist() == [0, 0, 0, 0, 0, 8.25, 9.625, 11, 12.375, 13.75]
    assert result.sum() == TEN.sum()
    assert merge_tensors("ties", zeros(10), zeros(10), density=0.5, rescale=True).tolist() == [0] * 10


def test_lambda_scales_what_is_added_to_the_base() -> None:
    assert merge_tensors("ties", task(1), task(5), task(3), lambda_=0.5).tolist() == [2.5]


def test_density_one_reads_nothing_beforehand() -> None:
    scan = one(TEN, TEN, base=zeros(10))
    assert of_tensor(scan, density=(1.0, 1.0)) == (None, None)
    assert (scan.passes, scan.samples) == (0, 0)


def test_each_model_has_its_own_density() -> None:
    (all_of_it, some) = of_tensor(one(TEN, -TEN, base=zeros(10)), density=(1.0, 0.2))
    assert all_of_it is None
    assert some is not None
    assert some.cut == Cut(threshold=9.0, last=9, tied=1)


def test_a_tensor_too_large_to_hold_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random(500, 40, dtype=torch.bfloat16)
    models = near(base, 2, step=0.003)
    options = {"density": 0.45, "rescale": True}
    expected = merge_tensors("ties", base, *models, rows=5, **options)
    monkeypatch.setattr(module, "largest", lambda *given: found_in_little_memory(*given))
    assert torch.equal(merge_tensors("ties", base, *models, rows=5, **options), expected)


def found_in_little_memory(*given):  # type: ignore[no-untyped-def]
    from mergekit_plus.statistics import largest

    return largest(*given, gather=10, cap=500)


def reference(base: np.ndarray, models: list[np.ndarray], weights: list[float], density: list[float], normalize: bool) -> np.ndarray:
    """TIES in float64 as the paper states it, ties to the lowest index."""
    terms = []
    for model, weight, share in zip(models, weights, density, strict=True):
        vector = model - base
        keep = np.zeros(vector.size, bool)
        keep[np.lexsort((np.arange(vector.size), -np.abs(vector)))[: max(1, int(share * vector.size))]] = True
        terms.append(weight * np.where(keep, vector, 0))
    sign = np.where(sum(terms) >= 0, 1, -1)  # type: ignore[operator]
    agreeing = [np.sign(term) == sign for term in terms]
    top = sum(np.where(agree, term, 0) for agree, term in zip(agreeing, terms, strict=True))
    below = sum(np.where(agree, weight, 0) for agree, weight in zip(agreeing, weights, strict=True))
    return base + (top / np.where(below == 0, 1, below) if normalize else top)


@given(st.integers(1, 60), st.integers(1, 4), st.lists(st.floats(0.05, 1), min_size=4, max_size=4), st.booleans(), st.integers(1, 9))
def test_agrees_with_the_paper_in_float64(size: int, count: int, density: list[float], normalize: bool, rows: int) -> None:
    base = random(size, dtype=torch.float64, seed=size)
    models = [base + (torch.randint(-4, 5, (size,), generator=torch.Generator().manual_seed(seed)) / 4).double() for seed in range(count)]
    models = [model + 0 for model in models]
    weights = [1.0, 0.5, 0.25, 2.0][:count]
    expected = reference(zeros(size).double().numpy(), [(model - base).numpy() for model in models], weights, density[:count], normalize)
    result = merge_tensors("ties", base, *models, weight=weights, density=density[:count], normalize=normalize, rows=rows)
    np.testing.assert_allclose((result - base).numpy(), expected, atol=1e-12)
