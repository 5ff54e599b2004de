"""One choice for each item, so that the losses add up to the least that a budget of costs allows; solved exactly, and proven.

    solve(losses, costs, budget=33_000_000)       # least summed loss within so many bits
    solve(losses, costs, max_loss=0.05)           # the dual: fewest bits within so much summed loss

Items are layers, ranks, experts; choices are widths, sparsities, ranks; costs are integers: bits, bytes, operations. The multiple-choice
knapsack problem, as integer programming allocates bits in Hubara et al., Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
Programming (2020). Losses may have any scale, sign and order: they are brought to integers of 51 bits between the least and
the best known total, so that neither a solver's tolerances nor the order of a sum decides anything. The proof therefore holds to 1e-12 of that spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np

from mergekit_plus.errors import OptionError

from .branch_and_bound import TOLERANCE, branch, prices
from .knapsack import LARGEST, Ints, Item, Kernel, fill, item_of, minimise, reduced_costs, relax

SPREAD = 51  # bits of the scaled losses' spread
PROVEN = 1e-12  # of the objective: a gap below is rounding

Numbers = Sequence[Sequence[float]]
Counts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Solution:
    """One choice for each item, what they add up to, and how good that provably is.

    `objective` is the summed loss, or the summed cost in the dual; `bound` is below the objective of every solution; `relaxed` is the bound of the
    linear relaxation alone. `fixed` items were decided by reduced costs. `proven` by "relaxation" (no choice was left), "states" (dynamic programming) or
    "branching" (HiGHS).
    """

    choices: tuple[int, ...]
    loss: float
    cost: int
    second: int | None
    objective: float
    bound: float
    relaxed: float
    proven: bool
    fixed: int
    by: Literal["relaxation", "states", "branching"]

    @property
    def gap(self) -> float:
        """How much better another solution could be, at most."""
        return max(0.0, self.objective - self.bound)


def solve(
    losses: Numbers, costs: Counts, budget: int | None = None, *, max_loss: float | None = None,
    second: tuple[Counts, int] | None = None, seconds: float = 20.0,
) -> Solution:  # fmt: skip
    """The choices of least summed loss that cost at most `budget`, or those of least cost that lose at most `max_loss`; of equals the cheapest.

    losses, costs: of each item, of each of its choices; items may have different numbers of choices. A loss may be infinite: that choice cannot be. second: the
    costs and the budget of another constraint (latency, operations). seconds: after which a hard instance is left with the gap that it has.
    Errors: OptionError for what cannot be met, with the least that could be.
    """
    _check(losses, costs, budget, max_loss)
    if second is not None:
        _check(losses, second[0], second[1], None)
    if max_loss is not None:
        if second is not None:
            raise OptionError("a second budget goes with a first; the smallest cost within a loss has one constraint only")
        return _cheapest(losses, costs, max_loss, seconds)
    assert budget is not None
    _check_budget(losses, costs, budget)
    if second is None:
        return _least_loss(losses, costs, budget, seconds)
    _check_budget(losses, *second)
    return _least_loss_twice(losses, costs, budget, *second, seconds)


def _check(losses: Numbers, costs: Counts, budget: int | None, max_loss: float | None) -> None:
    if (budget is None) == (max_loss is None):
        raise OptionError("give a budget, or the greatest loss: one of them")
    if len(losses) != len(costs) or any(len(ours) != len(theirs) or not len(ours) for ours, theirs in zip(losses, costs, strict=True)):
        raise OptionError("every item needs choices, and each choice a loss and a cost")
    for number, row in enumerate(losses):
        if any(math.isnan(loss) or loss == -math.inf for loss in row) or min(row) == math.inf:
            raise OptionError(f"item {number} has losses that cannot be: {list(row)}")
    top = sum(max(map(abs, map(int, row))) for row in costs)
    if any(int(cost) != cost or cost < 0 for row in costs for cost in row) or top > LARGEST:
        raise OptionError("costs are whole numbers from 0 on that add up to less than 2^52; count in a larger unit")


def _check_budget(losses: Numbers, costs: Counts, budget: int) -> None:
    least = sum(min(cost for loss, cost in zip(*rows, strict=True) if loss < math.inf) for rows in zip(losses, costs, strict=True))
    if least > budget:
        raise OptionError(f"a budget of {budget} cannot be met: the cheapest choices cost {least}")


def _least_loss(losses: Numbers, costs: Counts, budget: int, seconds: float) -> Solution:
    floors = [min(row) for row in losses]
    base, unit = _base_and_unit(costs)
    capacity = (budget - base) // unit

    def items(spread: float) -> tuple[list[Item], int]:
        shift = _shift(spread)
        return [item_of(loss, cost, index) for loss, cost, index in _integers(losses, costs, spread, shift, unit)], shift

    spread = sum(max(loss for loss in row if loss < math.inf) - floor for row, floor in zip(losses, floors, strict=True))
    relaxed = -math.inf
    while True:  # until the spread is that of a good solution: what loses more than all of it is in none that is better
        parts, shift = items(spread)
        if relaxed == -math.inf:
            price = math.ldexp(relax(parts, capacity).price, -shift) / unit
            relaxed = _lagrangian(losses, costs, budget, price)
        known = fill(parts, capacity)
        reached = math.fsum(losses[n][part.index[place]] - floors[n] for n, (part, place) in enumerate(zip(parts, known.tolist(), strict=True)))
        if not 0 < reached < spread / 1024:
            break
        spread = reached
    parts, shift = items(reached) if reached > 0 else (parts, shift)
    kernel = minimise(parts, capacity)
    choices, by = kernel.choices, _by(kernel)
    least = math.fsum(floors)
    bound = least + math.ldexp(kernel.bound, -shift)
    if not kernel.proven:
        choices, extra = _branch_core(kernel, parts, capacity, seconds)
        bound = max(bound, least + math.ldexp(extra, -shift))
        by = "branching"
    loss = _loss(losses, choices)
    bound = loss if kernel.proven else min(loss, max(bound, relaxed))
    proven = kernel.proven or _closed(loss, bound, relaxed)
    return Solution(tuple(choices), loss, _cost(costs, choices), None, loss, bound, min(relaxed, bound), proven, kernel.fixed, by)


def _cheapest(losses: Numbers, costs: Counts, max_loss: float, seconds: float) -> Solution:
    least = math.fsum(map(min, losses))
    if max_loss < least:
        raise OptionError(f"a loss of {max_loss:g} cannot be met: the best choices lose {least:g}")
    base, unit = _base_and_unit(costs)
    room = max(max_loss - least, 0.0)
    shift = _shift(room)
    parts = [item_of(cost, loss, index) for loss, cost, index in _integers(losses, costs, room, shift, unit)]
    capacity = math.floor(math.ldexp(room, shift)) + len(parts)  # each loss was rounded to a unit of 2^-51 of the room
    kernel = minimise(parts, capacity)
    choices, by = kernel.choices, _by(kernel)
    bound = base + unit * kernel.bound
    if not kernel.proven:
        choices, extra = _branch_core(kernel, parts, capacity, seconds)
        bound, by = max(bound, base + unit * math.ceil(extra - 1e-6)), "branching"
    cost = _cost(costs, choices)
    bound = float(cost) if kernel.proven else min(float(cost), bound)
    relaxed = min(base + unit * kernel.core.relaxed.value, bound)
    return Solution(tuple(choices), _loss(losses, choices), cost, None, float(cost), bound, relaxed, cost - bound < unit, kernel.fixed, by)


def _base_and_unit(costs: Counts) -> tuple[int, int]:
    """What the cheapest choices cost together, and the common divisor of what others cost more."""
    cheapest = [int(min(row)) for row in costs]
    return sum(cheapest), reduce(math.gcd, (int(cost) - low for row, low in zip(costs, cheapest, strict=True) for cost in row), 0) or 1


def _integers(losses: Numbers, costs: Counts, most: float, shift: int, unit: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Of each item the choices that lose at most `most` more than its least: losses above that in units of 2^-shift, costs above the cheapest, their places."""
    for row, own in zip(losses, costs, strict=True):
        floor, low = min(row), int(min(own))
        index = [number for number, loss in enumerate(row) if loss - floor <= most]
        loss = [round(math.ldexp(row[number] - floor, shift)) for number in index]
        cost = [(int(own[number]) - low) // unit for number in index]
        yield np.array(loss, dtype=np.int64), np.array(cost, dtype=np.int64), np.array(index, dtype=np.int64)


def _branch_core(kernel: Kernel, items: Sequence[Item], capacity: int, seconds: float) -> tuple[list[int], float]:
    """The core by branch and bound: the better of what it finds and what was known, and a bound, in the items' units."""
    core, price = kernel.core, kernel.core.relaxed.price
    cost = [reduced_costs(item, price)[places] for item, places in zip(items, core.open, strict=True)]
    weight = [item.weight[places] for item, places in zip(items, core.open, strict=True)]
    found = branch(cost, [weight], [capacity], [price], max(1.0, kernel.value - core.relaxed.value), seconds)
    choices = kernel.choices
    if found.places is not None:
        rows = [(item, int(places[place])) for item, places, place in zip(items, core.open, found.places, strict=True)]
        value, used = (sum(int(getattr(item, what)[place]) for item, place in rows) for what in ("value", "weight"))
        if used <= capacity and value < kernel.value:
            choices = [int(item.index[place]) for item, place in rows]
    return choices, core.relaxed.value + found.bound


def _least_loss_twice(losses: Numbers, costs: Counts, budget: int, others: Counts, limit: int, seconds: float) -> Solution:
    """With two budgets: relaxation, reduced costs, branch and bound; then again on what is left, in units of the gap that is left."""
    loss = [np.array(row, dtype=np.float64) for row in losses]
    tables = [[np.array(row, dtype=np.int64) for row in table] for table in (costs, others)]
    capacities = (budget, limit)
    open_ = [np.flatnonzero(row < math.inf) for row in loss]
    unit = max(float(np.ptp(row[places])) for row, places in zip(loss, open_, strict=True)) or 1.0
    price = prices([row[places] for row, places in zip(loss, open_, strict=True)], [_at(table, open_) for table in tables], capacities)
    impossible = OptionError(f"budgets of {budget} and {limit} cannot be met together; each alone can")
    if price is None:
        raise impossible
    total = [row + price[0] * first + price[1] * other for row, first, other in zip(loss, *tables, strict=True)]
    relaxed = math.fsum(float(row.min()) for row in total) - float(price @ np.array(capacities, dtype=np.float64))
    reduced = [row - row.min() for row in total]
    best, bound, reached = None, relaxed, math.inf
    for _ in range(3):
        found = branch(_at(reduced, open_), [_at(table, open_) for table in tables], capacities, price.tolist(), unit, seconds)
        if found.places is not None:
            choices = [int(places[place]) for places, place in zip(open_, found.places, strict=True)]
            if _cost(costs, choices) <= budget and _cost(others, choices) <= limit and _loss(losses, choices) < reached:
                best, reached = choices, _loss(losses, choices)
        if best is None:
            raise impossible if found.bound == math.inf else OptionError(f"no solution within {seconds:g} seconds; allow larger budgets")
        bound = min(reached, max(bound, relaxed + found.bound))
        gap = reached - relaxed
        if gap >= unit / 2 or reached - bound <= PROVEN * abs(reached):
            break
        unit = max(gap, 1e-15 * abs(reached))
        open_ = [np.flatnonzero(row <= gap * (1 + 1e-9)) for row in reduced]
    proven = _closed(reached, bound, relaxed)
    fixed = sum(len(places) == 1 for places in open_)
    assert best is not None
    return Solution(tuple(best), reached, _cost(costs, best), _cost(others, best), reached, bound, min(relaxed, bound), proven, fixed, "branching")


def _at(rows: Sequence[Any], places: Sequence[Ints]) -> list[Any]:
    return [row[place] for row, place in zip(rows, places, strict=True)]


def _closed(objective: float, bound: float, relaxed: float) -> bool:
    """Whether branch and bound has closed the gap, as far as its tolerance goes: 2e-6 of what it had to close."""
    return objective - bound <= max(PROVEN * abs(objective), 2 * TOLERANCE * (objective - relaxed))


def _shift(spread: float) -> int:
    """The power of two by which a spread becomes a number of 51 bits."""
    return SPREAD - math.frexp(spread)[1] if spread > 0 else 0


def _lagrangian(losses: Numbers, costs: Counts, budget: int, price: float) -> float:
    """A bound below every solution, whatever the price."""
    return math.fsum(min(loss + price * cost for loss, cost in zip(*rows, strict=True)) for rows in zip(losses, costs, strict=True)) - price * budget


def _loss(losses: Numbers, choices: Sequence[int]) -> float:
    return math.fsum(row[choice] for row, choice in zip(losses, choices, strict=True))


def _cost(costs: Counts, choices: Sequence[int]) -> int:
    return sum(int(row[choice]) for row, choice in zip(costs, choices, strict=True))


def _by(kernel: Kernel) -> Literal["relaxation", "states", "branching"]:
    return "relaxation" if all(len(places) == 1 for places in kernel.core.open) else "states"
