"""Exact order statistics and sums of a stream, in memory that does not grow with it and in few passes.

A rank is found as Floyd and Rivest (CACM 18, 1975) and Munro and Paterson (TCS 12, 1980) do: two elements of a sample bracket it,
then a pass over everything counts what lies below and at the two, and gathers what lies strictly between. The result is
always the exact element; the sample decides only how many passes it takes, one in practice. Elements equal to an end of the
bracket are counted and never gathered, because the differences of 16-bit models have enormous classes of equal values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Values = Callable[[Tensor | None, Sequence[Tensor]], Sequence[Tensor]]
Row = NDArray[np.floating[Any]]

GATHER = 1 << 22  # up to so many elements, one pass takes them all
CAP = 1 << 24  # elements gathered in one pass, over all rows and ranks
SAMPLE = 1 << 22  # elements of a row's sample
SIGMAS, DESIGN = 6.0, 16.0  # half-width of a bracket; variance of a rank relative to independent elements, which a row's are not


class Scan(Protocol):
    """The inputs of a statistic, piece by piece, in an order that never changes."""

    @property
    def size(self) -> int:
        """Elements of one model."""
        ...

    def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False, only: Collection[int] | None = None) -> Sequence[Any]:
        """`function(base, models)` of every piece, in order; with `sample`, of about a sixteenth of the pieces' rows; with `only`, of the pieces with these
        numbers."""
        ...

    def recall(self, compute: Callable[[], Any]) -> Any:
        """`compute()`, which is plain JSON; or what it was, where an interrupted save got as far and noted it."""
        ...


@dataclass(frozen=True)
class Cut:
    """The k largest elements: those above `threshold`, and those equal to it whose flat index is at most `last`."""

    threshold: float
    last: int
    tied: int  # how many of those equal to the threshold are kept


def order_statistics(
    scan: Scan,
    values: Values,
    ranks: Sequence[Sequence[int]],
    *,
    size: int | None = None,
    gather: int = GATHER,
    cap: int = CAP,
) -> list[list[float]]:
    """The elements at these 0-based ascending ranks of every row over the whole scan, exactly.

    values: a function from a piece to rows of float32 or float64, without NaN; `ranks[i]` are wanted of row i.
    size: length of a row, where `values` leaves elements out. gather, cap: elements held at most; they bound the memory and
    the number of passes, never the result. -0.0 counts as 0.0.
    """
    size = scan.size if size is None else size
    for rank in (rank for row in ranks for rank in row):
        if not 0 <= rank < size:
            raise IndexError(f"rank {rank} of {size} elements")
    if not any(ranks):
        return [[] for _ in ranks]
    elements: list[list[float]] = scan.recall(lambda: _order_statistics(scan, values, ranks, size, gather, cap))
    return elements


def _order_statistics(scan: Scan, values: Values, ranks: Sequence[Sequence[int]], size: int, gather: int, cap: int) -> list[list[float]]:
    if size <= gather:
        return [_select(row, wanted) for row, wanted in zip(_everything(scan, values), ranks, strict=True)]
    found = iter(_search(scan, values, [(row, rank) for row, wanted in enumerate(ranks) for rank in wanted], size, cap))
    return [[next(found).value for _ in wanted] for wanted in ranks]


def largest(scan: Scan, values: Values, counts: Sequence[int], *, gather: int = GATHER, cap: int = CAP) -> list[Cut]:
    """Where to cut so that exactly the `counts[i] >= 1` largest elements of row i stay; of equal ones, the first ones stay."""
    return [Cut(*cut) for cut in scan.recall(lambda: [[cut.threshold, cut.last, cut.tied] for cut in _largest(scan, values, counts, gather, cap)])]


def _largest(scan: Scan, values: Values, counts: Sequence[int], gather: int, cap: int) -> list[Cut]:
    size = scan.size
    if size <= gather:
        return [_cut(row, count) for row, count in zip(_everything(scan, values), counts, strict=True)]
    found = _search(scan, values, [(row, size - count) for row, count in enumerate(counts)], size, cap)
    tied = [each.below + each.equal - (size - count) for each, count in zip(found, counts, strict=True)]
    # the last one that is kept: in which piece, and the how-manieth of its equal ones
    places = []
    for each, left in zip(found, tied, strict=True):
        before = np.cumsum(each.pieces)
        piece = int(np.searchsorted(before, left))
        places.append((piece, left - int(before[piece]) + each.pieces[piece] - 1))
    whole = [left == each.equal for each, left in zip(found, tied, strict=True)]
    if all(whole):
        return [Cut(each.value, size - 1, left) for each, left in zip(found, tied, strict=True)]

    def find(base: Tensor | None, models: Sequence[Tensor]) -> list[int]:
        rows = _rows(values(base, models))
        indices = [np.flatnonzero(row == _exact(each.value, row)) for row, each in zip(rows, found, strict=True)]
        return [int(index[place]) if place < index.size else -1 for index, (_, place) in zip(indices, places, strict=True)]

    cut_in = sorted({piece for done, (piece, _) in zip(whole, places, strict=True) if not done})
    indices = dict(zip(cut_in, scan.map(find, only=cut_in), strict=True))
    return [
        Cut(each.value, size - 1 if whole[row] else sum(each.sizes[:piece]) + indices[piece][row], left)
        for row, (each, left, (piece, _)) in enumerate(zip(found, tied, places, strict=True))
    ]


def sums(scan: Scan, function: Callable[[Tensor | None, Sequence[Tensor]], Sequence[float]]) -> list[float]:
    """The sums over all pieces of the numbers that `function` gives for each, folded without rounding between pieces."""
    totals: list[float] = scan.recall(lambda: [math.fsum(column) for column in zip(*scan.map(function), strict=True)])
    return totals


@dataclass
class _Found:
    value: float
    below: int
    equal: int
    pieces: list[int]  # how many of the equal ones are in each piece
    sizes: list[int]  # elements in each


@dataclass
class _Target:
    """A wanted rank: it lies among the `inside` elements strictly between `low` and `high`, above `under` others."""

    row: int
    rank: int
    inside: int
    low: float = -math.inf
    high: float = math.inf
    under: int = 0
    sample: Row = field(default_factory=lambda: np.empty(0, np.float32))  # ascending, from strictly between
    bracket: tuple[float, float] = (-math.inf, math.inf)
    found: _Found | None = None


@dataclass(frozen=True, slots=True)
class _Counts:
    """What one piece says of one bracket: elements below it, at its ends, strictly inside, and every `stride`-th of the last."""

    below: int
    at_low: int
    inside: int
    at_high: int
    kept: Row
    stride: int
    size: int


def _search(scan: Scan, values: Values, wanted: Sequence[tuple[int, int]], size: int, cap: int) -> list[_Found]:
    targets = [_Target(row, rank, size) for row, rank in wanted]
    share = max(1, cap // len(targets))
    stride = max(1, scan.size // 16 // min(SAMPLE, cap)) | 1  # odd, so that it walks through the columns of a matrix

    def thin(base: Tensor | None, models: Sequence[Tensor]) -> list[Row]:
        return [row[stride // 2 :: stride].copy() for row in _rows(values(base, models))]

    samples = [np.sort(np.concatenate(pieces)) for pieces in zip(*scan.map(thin, sample=True), strict=True)]
    for target in targets:
        target.sample = samples[target.row]

    while waiting := [target for target in targets if target.found is None]:
        for target in waiting:
            target.bracket = _bracket(target, share)

        def count(base: Tensor | None, models: Sequence[Tensor], waiting: list[_Target] = waiting) -> list[_Counts]:
            rows = _rows(values(base, models))
            return [_count(rows[target.row], *target.bracket, 1.0 if target.inside <= share else 4 * share / size) for target in waiting]

        for target, counts in zip(waiting, zip(*scan.map(count), strict=True), strict=True):
            _narrow(target, counts)
    return [target.found for target in targets if target.found is not None]


def _bracket(target: _Target, share: int) -> tuple[float, float]:
    """Two values, of the sample or the interval's ends, between which the rank lies almost surely and few elements lie."""
    sample, length = target.sample, target.sample.size
    if target.inside <= share or not length:
        return target.low, target.high
    place = (target.rank - target.under + 0.5) / target.inside * length
    spread = SIGMAS * math.sqrt(DESIGN * place * max(0.0, 1 - place / length)) + SIGMAS * DESIGN
    spread = min(spread, share * length / (2 * target.inside))
    first, last = math.floor(place - spread), math.ceil(place + spread)
    low = float(sample[first]) if first >= 0 else target.low
    high = float(sample[last]) if last < length else target.high
    if (low, high) == (target.low, target.high):
        low = high = float(sample[min(int(place), length - 1)])  # one pivot: the interval becomes smaller in any case
    return low, high


def _count(row: Row, low: float, high: float, density: float) -> _Counts:
    bottom, top = _exact(low, row), _exact(high, row)
    above, under = row > bottom, row < top
    at_low = int(np.count_nonzero(row == bottom))
    at_high = int(np.count_nonzero(row == top)) if low < high else 0
    below = row.size - int(np.count_nonzero(above)) - at_low
    above &= under
    inside = int(np.count_nonzero(above))
    kept = row[above] if inside else row[:0].copy()
    stride = 1
    while inside > stride * (16 + density * row.size):
        stride *= 2  # powers of two, so that pieces can be brought to one stride afterwards
    return _Counts(below, at_low, inside, at_high, kept if stride == 1 else kept[stride // 2 :: stride].copy(), stride, row.size)


def _narrow(target: _Target, counts: Sequence[_Counts]) -> None:
    """Find the element, or shrink the interval in which it lies, from what every piece says of the bracket."""
    low, high = target.bracket
    below, at_low, inside, at_high = (sum(getattr(part, name) for part in counts) for name in ("below", "at_low", "inside", "at_high"))
    left = target.rank - below
    end = target.under + target.inside
    sizes = [part.size for part in counts]
    target.sample = target.sample[:0]
    if (left < 0 and not target.low < low) or (left >= at_low + inside + at_high and not high < target.high):
        raise ValueError("order statistics of values that are not numbers")
    if left < 0:
        target.high, target.inside = low, below - target.under
    elif left < at_low:
        target.found = _Found(low + 0.0, below, at_low, [part.at_low for part in counts], sizes)
    elif left < at_low + inside:
        stride = max(part.stride for part in counts)
        steps = [stride // part.stride for part in counts]
        kept = np.concatenate([part.kept[step // 2 :: step] for part, step in zip(counts, steps, strict=True)])
        target.low, target.high, target.under, target.inside = low, high, below + at_low, inside
        if stride == 1:
            rank = target.rank - target.under
            value = _select(kept.copy(), [rank])[0]
            pieces = [int(np.count_nonzero(part.kept == _exact(value, part.kept))) for part in counts]
            smaller = int(np.count_nonzero(kept < _exact(value, kept)))
            target.found = _Found(value, target.under + smaller, sum(pieces), pieces, sizes)
        else:
            target.sample = np.sort(kept)
    elif left < at_low + inside + at_high:
        target.found = _Found(high + 0.0, below + at_low + inside, at_high, [part.at_high for part in counts], sizes)
    else:
        target.low, target.under = high, below + at_low + inside + at_high
        target.inside = end - target.under


def _cut(row: Row, count: int) -> Cut:
    threshold = _select(row.copy(), [row.size - count])[0]
    value = _exact(threshold, row)
    tied = count - int(np.count_nonzero(row > value))
    equal = np.flatnonzero(row == value)
    return Cut(threshold, row.size - 1 if tied == equal.size else int(equal[tied - 1]), tied)


def _select(row: Row, ranks: Sequence[int]) -> list[float]:
    """The elements at these ranks; `row` is used up. Integers in the order of the floats are several times faster to partition."""
    row += row.dtype.type(0)  # makes -0.0 0.0
    keys = row.view(np.int32 if row.itemsize == 4 else np.int64)
    _monotone(keys)
    some = keys[:: keys.size // 4096 + 1]
    if np.unique(some).size < some.size // 2:
        keys.sort()  # many ties make partitioning slow and sorting fast
    else:
        start = 0
        for rank in sorted(set(ranks)):
            keys[start:].partition(rank - start)
            start = rank + 1
    chosen = keys[list(ranks)]
    _monotone(chosen)
    return [float(value) for value in chosen.view(row.dtype)]


def _monotone(keys: NDArray[Any]) -> None:
    """The bits of floats to integers in the same order, and back, in place."""
    if keys.size and keys.min() < 0:
        keys ^= (keys >> (8 * keys.itemsize - 1)) & np.iinfo(keys.dtype).max


def _everything(scan: Scan, values: Values) -> list[Row]:
    pieces = scan.map(lambda base, models: [row.copy() for row in _rows(values(base, models))])
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def _rows(rows: Sequence[Tensor]) -> list[Row]:
    return [row.detach().cpu().numpy().reshape(-1) for row in rows]


def _exact(value: float, row: Row) -> np.floating[Any]:
    """`value` as a scalar that compares with this row without rounding."""
    same = row.dtype.type(value)
    return same if float(same) == value else np.float64(value)
