"""The multiple-choice knapsack in integers: one choice an item, least total value within a capacity of weight, and the proof that it is least.

Nothing here knows what values and weights are; `allocate` scales losses and costs to integers that float64 holds, so that sums are exact.

1. Choices that another one of the item beats in both are dropped.
2. The linear relaxation: each item's lower convex hull, its steps taken in the order of their slope until the capacity is used. At most one
   item ends between two choices; the slope there is the price of capacity, and the value is a bound below every solution.
3. An incumbent: the steps that fit, and what else fits.
4. Reduced costs: a choice that costs more above its item's cheapest, at that price, than incumbent minus bound is in no better solution. What is
   left are a few items with a few choices each.
5. Dynamic programming over these, on the sparse list of (weight, value) pairs that no other pair beats. A pair goes when its value
   and the relaxation of the items that are left exceed the incumbent. First on the most promising pairs alone, for a better incumbent and another
   round of 4; then on all, which is a proof. Where weights have a large common divisor the list is no longer than the capacity in
   units of it, which is the classical table.

(Sinha and Zoltners 1979 for 2 and 4; Pisinger, A minimal algorithm for the multiple-choice knapsack problem, 1995, for the whole.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LARGEST = 1 << 52  # of a total: integers up to 2^53 are exact in float64
BEAM = 2_000  # pairs kept for each item while looking for an incumbent
PAIRS = 400_000  # pairs of one item beyond which the proof is left to branch and bound
STRETCH = 1e-12  # of a total: what float64 may be wrong by, generously


@dataclass(frozen=True)
class Item:
    """The choices of one item that no other beats: weights rise, values fall; `index` is their place among all."""

    weight: Ints
    value: Ints
    index: Ints
    hull: Ints  # places among these, the corners of the lower convex hull from the lightest choice on


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation: its value, the price of a unit of capacity, and the choices (places in the items) below it."""

    value: float
    price: float
    below: Ints


@dataclass(frozen=True)
class Kernel:
    """Choices (as the caller numbers them), their value, a bound below the value of every other solution, and how many items the bound alone decided."""

    choices: list[int]
    value: int
    bound: float
    proven: bool
    fixed: int
    core: Core


@dataclass(frozen=True)
class Core:
    """What reduced costs leave open: for each item its places that may still be better."""

    items: list[Item]
    open: list[Ints]
    relaxed: Relaxed


def item_of(value: Ints, weight: Ints, index: Ints) -> Item:
    """An item without the choices that another beats; of equal ones the first stays."""
    order = np.lexsort((index, value, weight))
    value, weight, index = value[order], weight[order], index[order]
    best = np.minimum.accumulate(value)
    keep = np.concatenate(([True], value[1:] < best[:-1]))
    value, weight, index = value[keep], weight[keep], index[keep]
    return Item(weight, value, index, _hull(weight.tolist(), value.tolist()))


def _hull(weight: Sequence[int], value: Sequence[int]) -> Ints:
    corners: list[int] = []
    for place in range(len(weight)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (value[a] - value[b]) * (weight[place] - weight[b]) > (value[b] - value[place]) * (weight[b] - weight[a]):
                break
            corners.pop()  # b lies on or above the line from a to here
        corners.append(place)
    return np.array(corners, dtype=np.int64)


@dataclass(frozen=True)
class Steps:
    """All steps along hulls, steepest first: whose, to which place, at what weight, for how much less value."""

    item: Ints
    to: Ints
    weight: Ints
    gain: Ints


def steps_of(items: Sequence[Item]) -> Steps:
    """The steps of these items; those of one item stay in their order."""
    whose = np.concatenate([np.full(len(item.hull) - 1, number) for number, item in enumerate(items)] or [np.empty(0, np.int64)])
    to = np.concatenate([item.hull[1:] for item in items] or [np.empty(0, np.int64)])
    weight = np.concatenate([np.diff(item.weight[item.hull]) for item in items] or [np.empty(0, np.int64)])
    gain = np.concatenate([-np.diff(item.value[item.hull]) for item in items] or [np.empty(0, np.int64)])
    order = np.argsort(-(gain / np.maximum(weight, 1)), kind="stable")
    return Steps(whose[order], to[order], weight[order], gain[order])


def relax(items: Sequence[Item], capacity: int) -> Relaxed:
    """The linear relaxation of items whose lightest choices fit."""
    steps = steps_of(items)
    left = capacity - sum(int(item.weight[0]) for item in items)
    value = sum(int(item.value[0]) for item in items)
    taken = np.cumsum(steps.weight)
    full = int(np.searchsorted(taken, left, side="right"))
    below = np.zeros(len(items), dtype=np.int64)
    below[steps.item[:full]] = steps.to[:full]  # the last of an item's steps counts, and they stand in their order
    value -= int(steps.gain[:full].sum())
    if full == len(steps.weight):
        return Relaxed(float(value), 0.0, below)
    price = float(steps.gain[full]) / float(steps.weight[full])
    rest = left - (int(taken[full - 1]) if full else 0)
    return Relaxed(value - rest * price, price, below)


def fill(items: Sequence[Item], capacity: int) -> Ints:
    """A good solution: steps along hulls while they fit, later ones of other items too, then whatever single change helps most."""
    steps = steps_of(items)
    at = np.zeros(len(items), dtype=np.int64)
    left = capacity - sum(int(item.weight[0]) for item in items)
    for whose, to in zip(steps.item.tolist(), steps.to.tolist(), strict=True):
        more = int(items[whose].weight[to] - items[whose].weight[at[whose]])
        if to > at[whose] and more <= left:
            at[whose], left = to, left - more
    weights, values = _padded([item.weight for item in items], LARGEST), _padded([item.value for item in items], LARGEST)
    rows = np.arange(len(items))
    while len(items):
        gain = np.where(weights - weights[rows, at][:, None] <= left, values[rows, at][:, None] - values, 0)
        best = int(gain.argmax())
        whose, to = divmod(best, weights.shape[1])
        if gain[whose, to] <= 0:
            break
        left -= int(weights[whose, to] - weights[whose, at[whose]])
        at[whose] = to
    return at


def _padded(rows: Sequence[Ints], filler: int) -> Ints:
    padded = np.full((len(rows), max(map(len, rows), default=0)), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def total(items: Sequence[Item], at: Ints, what: str) -> int:
    """The value, or weight, of a solution."""
    return sum(int(getattr(item, what)[place]) for item, place in zip(items, at.tolist(), strict=True))


def minimise(items: Sequence[Item], capacity: int) -> Kernel:
    """The least value within the capacity; of equal ones the lightest. Its lightest choices must fit.

    Not proven where the list of pairs grows beyond `PAIRS`; the core is then what branch and bound has to look at.
    """
    relaxed = relax(items, capacity)
    best = fill(items, capacity)
    best_value, best_weight = total(items, best, "value"), total(items, best, "weight")
    core = _core(items, relaxed, best_value)
    exact = _is_least(relaxed, best_value, capacity - best_weight)
    for limit in (BEAM, PAIRS):
        if exact:
            break
        found = _search(core, best, capacity, best_value, limit)
        if found.at is not None and (found.value, found.weight) < (best_value, best_weight):
            best, best_value, best_weight = found.at, found.value, found.weight
            core = _core(items, relaxed, best_value)
        exact = found.exact or _is_least(relaxed, best_value, capacity - best_weight)
    fixed = sum(len(places) == 1 for places in core.open)
    bound = float(best_value) if exact else min(float(best_value), float(np.ceil(relaxed.value - _slack(relaxed.value, best_value))))
    choices = [int(item.index[place]) for item, place in zip(items, best.tolist(), strict=True)]
    return Kernel(choices, best_value, bound, exact, fixed, core)


def _is_least(relaxed: Relaxed, value: int, left: int) -> bool:
    """Whether the relaxation alone proves a solution: none has less value, and one that leaves more of the capacity has more."""
    rounding = _slack(relaxed.value, value)
    return value - relaxed.value <= rounding and relaxed.price * (left + 1) > 2 * rounding


def _slack(*totals: float) -> float:
    return STRETCH * max(1.0, *map(abs, totals))


def _core(items: Sequence[Item], relaxed: Relaxed, best: int) -> Core:
    """Drop what reduced costs rule out; a choice that would reach the incumbent's very value stays."""
    gap = best - relaxed.value + _slack(relaxed.value, best)
    return Core(list(items), [np.flatnonzero(reduced_costs(item, relaxed.price) <= gap) for item in items], relaxed)


def reduced_costs(item: Item, price: float) -> Floats:
    """What each choice costs above the item's cheapest at this price of capacity."""
    cost = item.value + price * item.weight
    above: Floats = cost - cost.min()
    return above


@dataclass(frozen=True)
class _Found:
    at: Ints | None
    value: int
    weight: int
    exact: bool


def _search(core: Core, start: Ints, capacity: int, best: int, limit: int) -> _Found:
    """The best solution among the open choices that is no worse than `best`; exact where no item had more than `limit` pairs."""
    base_weight = sum(int(item.weight[places[0]]) for item, places in zip(core.items, core.open, strict=True) if len(places) == 1)
    base_value = sum(int(item.value[places[0]]) for item, places in zip(core.items, core.open, strict=True) if len(places) == 1)
    numbers = [number for number, places in enumerate(core.open) if len(places) > 1]
    # those with the widest choices first: the fine ones, which can fill what is left, stay for the end, where the relaxation is a good bound
    numbers.sort(key=lambda number: (-int(np.ptp(core.items[number].weight[core.open[number]])), number))
    parts = [item_of(core.items[n].value[core.open[n]], core.items[n].weight[core.open[n]], core.open[n]) for n in numbers]
    rest = _Rest(parts)
    weight, value = np.array([base_weight], dtype=np.int64), np.array([base_value], dtype=np.int64)
    trail: list[tuple[Ints, Ints]] = []
    exact, margin = True, _slack(core.relaxed.value, best)
    for number, part in enumerate(parts):
        weight = (weight[:, None] + part.weight).ravel()
        value = (value[:, None] + part.value).ravel()
        bounds = value + rest.after(number + 1, capacity - weight)
        alive = np.flatnonzero(bounds <= best + margin)
        weight, value = weight[alive], value[alive]
        order = np.lexsort((value, weight))
        falling = np.minimum.accumulate(value[order])
        order = order[np.concatenate(([True], value[order][1:] < falling[:-1]))] if len(order) else order
        if len(order) > limit:
            exact = False
            if limit == PAIRS:
                return _Found(None, 0, 0, False)
            order = np.sort(order[np.argpartition(bounds[alive][order], limit)[:limit]])
        weight, value = weight[order], value[order]
        trail.append((alive[order] // len(part.weight), alive[order] % len(part.weight)))
    fitting = np.flatnonzero(weight <= capacity)
    if not len(fitting):
        return _Found(None, 0, 0, exact)
    last = int(fitting[np.lexsort((weight[fitting], value[fitting]))[0]])
    found = _Found(start.copy(), int(value[last]), int(weight[last]), exact)
    assert found.at is not None
    for number, places in enumerate(core.open):
        found.at[number] = places[0]
    for number, part, (came, chose) in zip(reversed(numbers), reversed(parts), reversed(trail), strict=True):
        found.at[number] = part.index[chose[last]]
        last = int(came[last])
    return found


class _Rest:
    """The relaxations of the last items of a list, as functions of the capacity that is left for them."""

    def __init__(self, parts: Sequence[Item]) -> None:
        self.steps = steps_of(parts)
        self.lightest = np.concatenate((np.cumsum([int(part.weight[0]) for part in parts][::-1])[::-1], [0])).astype(np.float64)
        self.dearest = np.concatenate((np.cumsum([int(part.value[0]) for part in parts][::-1])[::-1], [0])).astype(np.float64)

    def after(self, first: int, left: Ints) -> Floats:
        """The least value of the items from `first` on within what is left; infinite where they do not fit."""
        mine = self.steps.item >= first
        weights = self.lightest[first] + np.concatenate(([0.0], np.cumsum(self.steps.weight[mine])))
        values = self.dearest[first] - np.concatenate(([0.0], np.cumsum(self.steps.gain[mine])))
        bounds: Any = np.interp(left, weights, values)
        return np.where(left < weights[0], np.inf, bounds)
