"""The optimiser: the best of so many evaluations, never more, always the same ones."""

from __future__ import annotations

import math

import pytest

from mergekit_plus.search.optimise import Point, minimise
from mergekit_plus.search.space import Axis

LAMBDA, RATIO = Axis("lambda", None, 0, 2, 1.0, scale=True), Axis("ratio", None, 0.05, 1, 0.1)
EACH = [Axis("lambda", model, 0, 2, 1.0, scale=True) for model in range(3)]


def bowl(*lowest: float):  # type: ignore[no-untyped-def]
    return lambda point: math.fsum((value - low) ** 2 for value, low in zip(point, lowest, strict=True))


@pytest.mark.parametrize(
    ("axes", "lowest"),
    [([LAMBDA], (0.31,)), ([LAMBDA, RATIO], (0.4, 0.7)), (EACH, (0.3, 0.5, 0.4)), ([*EACH, RATIO], (0.3, 0.5, 0.4, 1))],
)
def test_the_lowest_point_of_a_bowl_is_found(axes: list[Axis], lowest: tuple[float, ...]) -> None:
    seen = minimise(bowl(*lowest), axes, 60)
    best = min(seen, key=lambda point: seen[point])
    assert best == pytest.approx(lowest, abs=0.02)


@pytest.mark.parametrize("axes", [[LAMBDA], [LAMBDA, RATIO], EACH, [*EACH, RATIO]])
@pytest.mark.parametrize("budget", [2, 7, 20])
def test_the_budget_is_kept_the_start_comes_first_and_nothing_is_evaluated_twice(axes: list[Axis], budget: int) -> None:
    calls: list[Point] = []

    def value(point: Point) -> float:
        calls.append(point)
        return bowl(*[0.3] * len(axes))(point)

    seen = minimise(value, axes, budget)
    assert list(seen) == calls
    assert calls[0] == tuple(axis.start for axis in axes)
    assert len(set(calls)) == len(calls) <= budget
    assert all(axis.low <= number <= axis.high for point in calls for axis, number in zip(axes, point, strict=True))
    assert minimise(bowl(*[0.3] * len(axes)), axes, budget) == seen


def test_a_second_valley_at_the_end_of_an_axis_is_found_too() -> None:
    def value(point: Point) -> float:
        scale, share = point
        return (scale - 0.9) ** 2 if share == 1 else 0.1 + (scale - 0.3) ** 2 + (share - 0.3) ** 2

    seen = minimise(value, [LAMBDA, RATIO], 24)
    assert min(seen, key=lambda point: seen[point]) == pytest.approx((0.9, 1), abs=0.02)


def test_values_that_are_not_finite_are_worse_than_any_other() -> None:
    def value(point: Point) -> float:
        return math.inf if point[0] > 1.1 or point[1] > 0.9 else bowl(0.9, 0.7)(point)

    seen = minimise(value, [LAMBDA, RATIO], 40)
    assert min(seen.values()) < 0.02
    assert len(minimise(lambda point: math.inf, [LAMBDA, RATIO], 10)) <= 10
