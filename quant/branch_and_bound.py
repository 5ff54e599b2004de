"""HiGHS, where dynamic programming does not reach: two budgets at once, and cores that are too large. Scaled, quiet, and never taken at its word.

Objectives of 1e-6 and less are below HiGHS's absolute tolerances: it then calls solutions optimal that are several times worse than the optimum. So it is given
reduced costs in units of incumbent minus bound, and budgets in units of themselves; what it returns is recomputed by whoever calls.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .knapsack import Floats, Ints

TOLERANCE = 1e-6  # absolute, of HiGHS, in the units that it is given


@dataclass(frozen=True)
class Branched:
    """The place that each item was given, None where no solution was found in time; and a bound below every solution, in the units of `cost`."""

    places: list[int] | None
    bound: float


def branch(
    cost: Sequence[Floats], weights: Sequence[Sequence[Ints]], capacities: Sequence[int], prices: Sequence[float], unit: float, seconds: float
) -> Branched:
    """Least total of reduced costs and of the prices of what is left of each capacity; one place of each item, each total weight within its capacity.

    cost: of each item, at least 0. weights: for each capacity, of each item. unit: a cost of which HiGHS's tolerance is a negligible part.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    one, starts = _one_of_each([len(row) for row in cost])
    columns, count = one.shape[1], len(capacities)
    scales = [max(1, capacity) for capacity in capacities]
    used = np.stack([np.concatenate(rows) / scale for rows, scale in zip(weights, scales, strict=True)])
    left = np.eye(count)  # a column for what is left of each capacity
    one.resize((one.shape[0], columns + count))
    with _silent_stdout():
        result = milp(
            np.concatenate([*cost, np.multiply(prices, scales)]) / unit, integrality=np.repeat([1, 0], [columns, count]),
            bounds=Bounds(0, np.repeat([1.0, np.inf], [columns, count])),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(csr_array(np.hstack([used, left])), *[np.divide(capacities, scales)] * 2)],
            options={"mip_rel_gap": 0.0, "time_limit": max(0.1, seconds)},
        )  # fmt: skip
    bound = -np.inf if result.mip_dual_bound is None else (result.mip_dual_bound - TOLERANCE) * unit
    if result.x is None:
        return Branched(None, np.inf if result.status == 2 else bound)
    return Branched([int(part.argmax()) for part in np.split(result.x[:columns], starts[1:])], bound)


def prices(cost: Sequence[Floats], weights: Sequence[Sequence[Ints]], capacities: Sequence[int]) -> NDArray[np.float64] | None:
    """The price of a unit of each capacity in the linear relaxation, at least 0; None where not even that has a solution."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    one, _ = _one_of_each([len(row) for row in cost])
    scales = [max(1, capacity) for capacity in capacities]
    limits = csr_array(np.stack([np.concatenate(rows) / scale for rows, scale in zip(weights, scales, strict=True)]))
    flat = np.concatenate(cost)
    unit = float(np.abs(flat).max(initial=0.0)) or 1.0
    with _silent_stdout():
        result = linprog(
            flat / unit, A_ub=limits, b_ub=[capacity / scale for capacity, scale in zip(capacities, scales, strict=True)],
            A_eq=one, b_eq=np.ones(one.shape[0]), bounds=(0, None), method="highs",
        )  # fmt: skip
    if result.x is None:
        return None
    found: NDArray[np.float64] = np.maximum(0.0, -result.ineqlin.marginals) * unit / np.array(scales, dtype=np.float64)
    return found


def _one_of_each(sizes: Sequence[int]) -> tuple[Any, Ints]:
    """The matrix [items, choices of all items] of which choice is whose, and where each item's begin."""
    from scipy.sparse import csr_array

    columns = sum(sizes)
    whose = np.repeat(np.arange(len(sizes)), sizes), np.arange(columns)
    return csr_array((np.ones(columns), whose), shape=(len(sizes), columns)), np.cumsum([0, *sizes[:-1]])


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS writes debugging lines to the process's standard output, which may be a program's JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
