"""Minimise a function of few numbers, each evaluation of which is a model measured: the best of a fixed number of evaluations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from .space import Axis

Point = tuple[float, ...]
RADIUS = 0.1  # of COBYQA's first steps, as a share of each axis
LARGE = 1e30  # stands for an infinite value where a parabola is laid through it
NEAR = 0.1  # share of an axis within which its end is as good as its start
CLOSE = 1e-3  # share of an axis below which a step is not worth a model


class _Spent(Exception):
    """The budget is used up."""


def minimise(value: Callable[[Point], float], axes: Sequence[Axis], budget: int) -> dict[Point, float]:
    """Every point that was evaluated, in order, with its value; at most `budget`, the start first. Deterministic.

    One axis: Brent's bounded minimiser. Several: half of the budget goes along the scale (`Axis.scale`, of all models together) with the other
    options at their start and at each end that is far from it, because how much is kept and by how much it is scaled depend on each other, in more
    than one valley; then COBYQA (Ragonneau and Zhang 2023), a trust-region method that keeps to bounds, from the best of these over all
    axes. Both are scipy's. It ends early where steps become smaller than a thousandth of an axis.
    """
    seen: dict[Point, float] = {}

    def at(places: Sequence[float], limit: int) -> float:
        point = tuple(axis.at(float(place)) for axis, place in zip(axes, places, strict=True))
        if point not in seen:
            if len(seen) >= limit:
                raise _Spent
            seen[point] = value(point)
        return min(seen[point], LARGE)

    start = [axis.place(axis.start) for axis in axes]
    at(start, budget)
    scale = next((axis.option for axis in axes if axis.scale), None)
    if scale is not None and len(axes) > 1:
        others = {axis.option: place for axis, place in zip(axes, start, strict=True) if axis.option != scale}
        ends = [(option, end) for option, place in others.items() for end in (1.0, 0.0) if abs(end - place) > NEAR]
        settings = [start] + [[end if axis.option == option else place for axis, place in zip(axes, start, strict=True)] for option, end in ends]
        for index, setting in enumerate(settings):
            limit = len(seen) + (budget // 2 - len(seen)) // (len(settings) - index)

            def along(places: Sequence[float], setting: Sequence[float] = setting, limit: int = limit) -> float:
                return at([places[0] if axis.option == scale else place for axis, place in zip(axes, setting, strict=True)], limit)

            _descend(along, [0.0], budget)
    best = min(seen, key=lambda point: seen[point])
    _descend(lambda places: at(places, budget), [axis.place(number) for axis, number in zip(axes, best, strict=True)], budget)
    return seen


def _descend(at: Callable[[Sequence[float]], float], start: Sequence[float], budget: int) -> None:
    """Evaluate in the unit cube, from `start` where there are several axes, until steps are small or `at` says that it is spent."""
    from scipy.optimize import minimize, minimize_scalar

    with contextlib.suppress(_Spent):
        if len(start) == 1:
            minimize_scalar(lambda place: at([place]), bounds=(0, 1), method="bounded", options={"xatol": CLOSE, "maxiter": budget})
        else:
            minimize(
                at, start, method="COBYQA", bounds=[(0, 1)] * len(start),
                options={"initial_tr_radius": RADIUS, "final_tr_radius": CLOSE, "maxfev": 2 * budget},
            )  # fmt: skip
