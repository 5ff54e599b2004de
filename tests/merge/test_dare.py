"""`dare_linear` and `dare_ties`: random masks, unbiased by division with the density."""

from __future__ import annotations

import pytest
import torch
from merge_toys import merge_tensors, random
from torch import ones, zeros

MILLION = (1000, 1000)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_an_element_is_dropped_or_divided_by_the_density(method: str) -> None:
    result = merge_tensors(method, zeros(MILLION), ones(MILLION), density=0.25)
    assert result.unique().tolist() == [0.0, 4.0]
    assert abs(result.mean().item() - 1) < 4 * 3**0.5 / 1000  # four standard deviations of the mean
    assert merge_tensors(method, zeros(MILLION), ones(MILLION), density=0.25, rescale=False).unique().tolist() == [0.0, 1.0]


def test_the_expectation_is_task_arithmetic() -> None:
    base, models = random(50, seed=0), [random(50, seed=1), random(50, seed=2)]
    options = {"weight": [0.6, 0.3], "lambda": 0.8}
    runs = torch.stack([merge_tensors("dare_linear", base, *models, seed=seed, density=0.5, **options) for seed in range(2000)])
    spread = runs.std(0) / 2000**0.5
    assert bool(((runs.mean(0) - merge_tensors("task_arithmetic", base, *models, **options)).abs() < 5 * spread + 1e-6).all())


def test_mean_and_spread_are_those_of_the_bernoulli_mask() -> None:
    vectors = [random(*MILLION, seed=seed) for seed in (1, 2)]
    result = merge_tensors("dare_linear", zeros(MILLION), *vectors, weight=[1, 0.5], density=0.5)
    assert abs(result.mean().item()) < 0.01
    assert abs(result.std().item() - (1.25 / 0.5) ** 0.5) < 0.01


def test_models_are_dropped_independently() -> None:
    result = merge_tensors("dare_linear", zeros(MILLION), ones(MILLION), ones(MILLION), density=0.5, rescale=False)
    share = [(result == value).double().mean().item() for value in (0, 1, 2)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.003)


def test_dare_ties_sums_those_that_agree() -> None:
    both = merge_tensors("dare_ties", zeros(MILLION), ones(MILLION), ones(MILLION), weight=[1, 0.5], density=0.5, rescale=False)
    assert both.unique().tolist() == [0.0, 0.5, 1.0, 1.5]
    mean = merge_tensors("dare_ties", zeros(MILLION), ones(MILLION), ones(MILLION), weight=[1, 0.5], density=0.5, rescale=False, normalize=True)
    assert mean.unique().tolist() == [0.0, 1.0]


def test_dare_ties_elects_the_sign_after_dropping() -> None:
    result = merge_tensors("dare_ties", zeros(MILLION), ones(MILLION), -ones(MILLION), weight=[1, 0.5], density=0.5, rescale=False)
    share = {value: (result == value).double().mean().item() for value in (-0.5, 0.0, 1.0)}
    assert share == pytest.approx({-0.5: 0.25, 0.0: 0.25, 1.0: 0.5}, abs=0.003)


def test_density_one_is_the_method_without_dropping() -> None:
    base, models = random(9, 9), [random(9, 9, seed=1), random(9, 9, seed=2)]
    assert torch.equal(merge_tensors("dare_linear", base, *models), merge_tensors("task_arithmetic", base, *models))
    assert torch.equal(merge_tensors("dare_ties", base, *models, normalize=True), merge_tensors("ties", base, *models))


def test_each_model_has_its_own_density() -> None:
    result = merge_tensors("dare_linear", zeros(MILLION), ones(MILLION), 10 * ones(MILLION), density=[1, 0.5])
    assert result.unique().tolist() == [1.0, 21.0]
