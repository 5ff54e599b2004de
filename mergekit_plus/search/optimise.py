"""Minimise a function of few numbers, each evaluation of which is a model measured: the best of a fixed number of evaluations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from statistics import fmean

from .space import Axis

Point = tuple[float, ...]
RADIUS = 0.2  # of COBYQA's first steps, as a share of each axis
CLOSE = 1e-3  # share of an axis below which a step is not worth a model


class _Spent(Exception):
    """The budget is used up."""


def minimise(value: Callable[[Point], float], axes: Sequence[Axis], budget: int) -> dict[Point, float]:
    """Every point that was evaluated, in order, with its value; at most `budget`, the start first. Deterministic.

    One axis: Brent's bounded minimiser; several: COBYQA (Ragonneau and Zhang 2023), a trust-region method with quadratic models that keeps to
    bounds; both are scipy's. Axes of single models are first moved together, for a third of the budget. It ends early where steps become smaller
    than a thousandth of an axis.
    """
    seen: dict[Point, float] = {}

    def at(places: Sequence[float], limit: int) -> float:
        point = tuple(axis.at(float(place)) for axis, place in zip(axes, places, strict=True))
        if point not in seen:
            if len(seen) >= limit:
                raise _Spent
            seen[point] = value(point)
        return seen[point]

    def best() -> list[float]:
        point = min(seen, key=lambda point: seen[point])
        return [axis.place(number) for axis, number in zip(axes, point, strict=True)]

    at([axis.place(axis.start) for axis in axes], budget)
    options = list(dict.fromkeys(axis.option for axis in axes))
    groups = [options.index(axis.option) for axis in axes]  # the axes that move together, at first
    if len(options) < len(axes):
        together = [fmean(place for place, group in zip(best(), groups, strict=True) if group == index) for index in range(len(options))]
        _descend(lambda places: at([places[group] for group in groups], budget // 3), together, budget)
    _descend(lambda places: at(places, budget), best(), budget)
    return seen


def _descend(at: Callable[[Sequence[float]], float], start: Sequence[float], budget: int) -> None:
    """Evaluate from a start in the unit cube until steps are small or the budget is spent."""
    from scipy.optimize import minimize, minimize_scalar

    with contextlib.suppress(_Spent):
        if len(start) == 1:
            minimize_scalar(lambda place: at([place]), bounds=(0, 1), method="bounded", options={"xatol": CLOSE, "maxiter": budget})
        else:
            minimize(
                at, start, method="COBYQA", bounds=[(0, 1)] * len(start),
                options={"initial_tr_radius": RADIUS, "final_tr_radius": CLOSE, "maxfev": 2 * budget},
            )  # fmt: skip
