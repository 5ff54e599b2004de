"""`nuslerp`, `multislerp`, `karcher` and `model_stock`: merges that need nothing but the angles between models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from merge_toys import merge_tensors, near, random
from torch import tensor, zeros

from mergekit_plus.merge.sphere import karcher_mean

EAST, NORTH, HALF = tensor([1.0, 0.0]), tensor([0.0, 1.0]), math.sqrt(0.5)


def test_nuslerp_halfway_between_east_and_north_is_north_east() -> None:
    torch.testing.assert_close(merge_tensors("nuslerp", None, EAST, NORTH), tensor([HALF, HALF]))


def test_nuslerp_goes_as_far_as_the_second_weight_says_and_half_way_where_they_cancel() -> None:
    angle = math.pi / 2 * 0.25
    torch.testing.assert_close(merge_tensors("nuslerp", None, EAST, NORTH, weight=[3, 1]), tensor([math.cos(angle), math.sin(angle)]))
    torch.testing.assert_close(merge_tensors("nuslerp", None, EAST, NORTH, weight=[1, -1]), tensor([HALF, HALF]))


def test_nuslerp_with_a_base_goes_between_task_vectors() -> None:
    base = tensor([5.0, 7.0])
    torch.testing.assert_close(merge_tensors("nuslerp", base, base + EAST, base + NORTH), base + HALF)


def test_nuslerp_by_rows_and_by_columns() -> None:
    one, other = tensor([[1.0, 0.0], [2.0, 2.0]]), tensor([[0.0, 1.0], [4.0, 4.0]])
    rows = merge_tensors("nuslerp", None, one, other, nuslerp_flatten=False)
    torch.testing.assert_close(rows, tensor([[HALF, HALF], [3.0, 3.0]]))  # the second rows are parallel: a straight line
    columns = merge_tensors("nuslerp", None, one.T.contiguous(), other.T.contiguous(), nuslerp_flatten=False, nuslerp_row_wise=True)
    torch.testing.assert_close(columns, rows.T)


def test_multislerp_is_the_mean_direction_at_the_mean_length() -> None:
    torch.testing.assert_close(merge_tensors("multislerp", None, 3 * EAST, 5 * NORTH), tensor([4 * HALF, 4 * HALF]))
    weighted = merge_tensors("multislerp", None, 3 * EAST, 5 * NORTH, weight=[0.8, 0.6], normalize_weights=False)
    torch.testing.assert_close(weighted, (2.4 + 3.0) * tensor([0.8, 0.6]))


def test_multislerp_averages_directions_that_cancel() -> None:
    assert merge_tensors("multislerp", None, EAST, -EAST).tolist() == [0.0, 0.0]
    third = [tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert merge_tensors("multislerp", None, *third).abs().max() < 1e-15


def test_karcher_of_east_and_north_is_north_east_at_their_mean_length() -> None:
    torch.testing.assert_close(merge_tensors("karcher", None, EAST, 3 * NORTH), tensor([2 * HALF, 2 * HALF]))


def test_karcher_has_the_least_mean_squared_angle() -> None:
    models = [random(30, dtype=torch.float64, seed=seed) + 1 for seed in range(4)]
    mean = merge_tensors("karcher", None, *models, max_iter=100, tol=1e-9)

    def cost(point: torch.Tensor) -> float:
        return sum(math.acos(float(torch.cosine_similarity(point, model, dim=0))) ** 2 for model in models)

    assert all(cost(mean) < cost(mean + 0.01 * random(30, dtype=torch.float64, seed=100 + seed)) for seed in range(20))


def test_a_zero_tensor_has_no_direction_but_counts_in_the_mean_length() -> None:
    assert merge_tensors("karcher", None, 2 * EAST, zeros(2)).tolist() == [1.0, 0.0]
    assert merge_tensors("karcher", None, zeros(2), zeros(2)).tolist() == [0.0, 0.0]


def test_karcher_of_opposites_stays_with_the_first() -> None:
    assert karcher_mean(np.array([[1.0, -1.0], [-1.0, 1.0]]), 10, 1e-5) == [1.0, 0.0]


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_to_the_mean_of_parallel_task_vectors_and_nowhere_at_a_right_angle_or_beyond(filter_wise: bool) -> None:
    def stock(*models: torch.Tensor) -> list[float]:
        return merge_tensors("model_stock", zeros(2), *models, filter_wise=filter_wise).tolist()

    assert stock(EAST, 3 * EAST) == [2.0, 0.0]
    assert stock(EAST, NORTH) == [0.0, 0.0]
    assert stock(EAST, tensor([-0.5, 1.0])) == [0.0, 0.0]  # mergekit: t = -1.6, away from both
    assert stock(EAST, -EAST) == [0.0, 0.0]


def test_model_stock_at_sixty_degrees_goes_two_thirds_of_the_way() -> None:
    models = EAST, tensor([0.5, math.sqrt(0.75)])
    torch.testing.assert_close(merge_tensors("model_stock", zeros(2), *models), 2 / 3 * (models[0] + models[1]) / 2)


def test_model_stock_by_rows_gives_each_row_its_own_way() -> None:
    models = torch.stack([EAST, EAST]), torch.stack([EAST, NORTH])
    assert merge_tensors("model_stock", zeros(2, 2), *models, filter_wise=True).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_angles_of_nearly_equal_models_keep_their_digits() -> None:
    base = random(400, 400)
    models = near(base, 2, step=1e-4)
    exact = [model.double() for model in models]
    for method in ("nuslerp", "multislerp", "karcher"):
        torch.testing.assert_close(merge_tensors(method, None, *models).double(), merge_tensors(method, None, *exact), rtol=1e-6, atol=1e-7)
