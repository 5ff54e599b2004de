"""`linear`, `slerp` and `task_arithmetic`, with numbers one can check in the head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import merge_tensors, near, random
from torch import tensor


def test_linear_is_the_mean() -> None:
    assert merge_tensors("linear", None, tensor([1.0, 2.0]), tensor([3.0, 6.0])).tolist() == [2.0, 4.0]


def test_linear_with_weights_divides_by_their_sum_unless_told_not_to() -> None:
    models = tensor([4.0]), tensor([8.0])
    assert merge_tensors("linear", None, *models, weight=[3, 1]).tolist() == [5.0]
    assert merge_tensors("linear", None, *models, weight=[3, 1], normalize=False).tolist() == [20.0]


def test_linear_of_one_model_is_that_model() -> None:
    assert merge_tensors("linear", None, tensor([0.1, -0.0])).tolist() == [float(tensor(0.1)), -0.0]


def test_linear_in_bfloat16_is_rounded_once() -> None:
    models = [random(300, 300, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    weights = [math.pi / 10, math.e / 5, 0.13]  # with round weights many results lie halfway between two bfloat16 values
    exact = sum(weight * model.double() for weight, model in zip(weights, models, strict=True))
    merged = merge_tensors("linear", None, *models, weight=weights, normalize=False).bfloat16()
    assert (merged == exact.bfloat16()).double().mean() >= 0.999  # type: ignore[union-attr]


def test_slerp_halfway_between_east_and_north_is_north_east() -> None:
    halfway = merge_tensors("slerp", tensor([1.0, 0.0]), tensor([0.0, 1.0]), t=0.5)
    torch.testing.assert_close(halfway, tensor([math.sqrt(0.5), math.sqrt(0.5)]))


def test_slerp_begins_at_the_base_and_ends_at_the_model() -> None:
    base, model = tensor([3.0, 0.0]), tensor([0.0, 5.0])
    assert merge_tensors("slerp", base, model, t=0).tolist() == [3.0, 0.0]
    torch.testing.assert_close(merge_tensors("slerp", base, model, t=1), model)


def test_slerp_does_not_normalize_its_ends() -> None:
    torch.testing.assert_close(
        merge_tensors("slerp", tensor([2.0, 0.0]), tensor([0.0, 1.0]), t=0.25),
        tensor([2 * math.sin(0.75 * math.pi / 2), math.sin(0.25 * math.pi / 2)]),
    )


def test_slerp_of_parallel_or_opposite_vectors_is_a_straight_line() -> None:
    assert merge_tensors("slerp", tensor([1.0, 0.0]), tensor([-1.0, 0.0]), t=0.25).tolist() == [0.5, 0.0]
    assert merge_tensors("slerp", tensor([1.0, 1.0]), tensor([3.0, 3.0]), t=0.5).tolist() == [2.0, 2.0]


def test_slerp_of_a_zero_vector_is_that_at_a_right_angle() -> None:
    result = merge_tensors("slerp", tensor([0.0, 0.0]), tensor([0.0, 1.0]), t=0.25)
    torch.testing.assert_close(result, tensor([0.0, math.sin(math.pi / 8)]))
    assert merge_tensors("slerp", torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


@given(st.floats(0, 1), st.floats(0.01, 3.1), st.floats(0.1, 10))
def test_slerp_between_vectors_of_one_length_keeps_that_length(t: float, angle: float, length: float) -> None:
    base = tensor([length, 0.0], dtype=torch.float64)
    model = length * tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    nearly_parallel = math.cos(angle) > 0.9995
    assert math.isclose(merge_tensors("slerp", base, model, t=t).norm().item(), length, rel_tol=2e-3 if nearly_parallel else 1e-9)


def test_slerp_measures_the_angle_in_float64() -> None:
    base = random(400, 400)
    (model,) = near(base, 1, step=0.5)
    a, b = base.double(), model.double()
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(merge_tensors("slerp", base, model, t=0.3, rows=3).double(), expected, rtol=1e-6, atol=1e-6)


def test_task_arithmetic_adds_weighted_task_vectors_to_the_base() -> None:
    base, models = tensor([10.0]), (tensor([12.0]), tensor([9.0]))
    assert merge_tensors("task_arithmetic", base, *models).tolist() == [11.0]
    assert merge_tensors("task_arithmetic", base, *models, weight=[1, 2], lambda_=0.5).tolist() == [10.0]
    assert merge_tensors("task_arithmetic", base, *models, weight=[1, 3], normalize=True).tolist() == [9.75]


def test_task_arithmetic_carries_density_and_rescale_without_effect() -> None:
    base, model = tensor([0.0, 0.0]), tensor([1.0, 2.0])
    assert merge_tensors("task_arithmetic", base, model, density=0.1, rescale=True).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lambda_scales_the_task_vector(scale: float) -> None:
    assert merge_tensors("task_arithmetic", tensor([1.0]), tensor([3.0]), lambda_=scale).tolist() == [1 + 2 * scale]
