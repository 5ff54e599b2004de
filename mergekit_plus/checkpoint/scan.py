"""What is known only after going over tensors: a `Scan` hands a statistic what some steps read, a `Measured` keeps the value for those that need it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from .checkpoint import Rows
from .plan import Step, gather, pieces, read_parts
from .spec import natural_order

Visit = Callable[[Sequence[Tensor]], Any]
ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Recall = Callable[[Callable[[], Any]], Any]  # the result of this, had from a journal where an interrupted save has noted it


class Scan:
    """What some steps read, piece by piece, in an order that depends on nothing but the tensors' names and shapes."""

    def __init__(
        self, steps: Sequence[Step], held: Sequence[Tensor] | None = None, parallel: ParallelMap = map, recall: Recall = lambda compute: compute()
    ) -> None:
        self.steps = sorted(steps, key=lambda step: natural_order(step.writes[0].name))
        self.held, self.parallel, self.recall = held, parallel, recall
        self.size = sum(step.writes[0].numel for step in steps)

    def map(self, visit: Visit, sample: bool = False, only: Collection[int] | None = None) -> list[Any]:
        """`visit(tensors)` of every piece, in order; with `sample`, of about a sixteenth of the rows; with `only`, of the pieces with these numbers."""
        slabs = [(step, rows) for step in self.steps for slab in step.slabs() for rows in (_sampled(step, slab) if sample else [slab])]
        cuts = {(id(step), rows.start): pieces(step, rows) for step, rows in slabs}
        if only is not None:
            number, wanted = count(), set(only)
            cuts = {place: [piece for piece in cut if next(number) in wanted] for place, cut in cuts.items()}
            slabs = [(step, rows) for step, rows in slabs if cuts[id(step), rows.start]]
        visits = self.parallel(lambda slab: self._visit(visit, *slab, cuts=cuts[id(slab[0]), slab[1].start]), slabs)
        return [result for results in visits for result in results]

    def _visit(self, visit: Visit, step: Step, rows: Rows, *, cuts: Sequence[Rows]) -> list[Any]:
        if self.held is not None:
            tensors, origin = list(self.held), slice(0, step.rows)
        else:
            tensors, origin = gather(step, rows if step.cut else None), rows
        return [visit(read_parts(step, tensors, piece, origin)) for piece in cuts]


def _sampled(step: Step, slab: Rows) -> list[Rows]:
    """Four runs of rows, together about a sixteenth of the slab; the whole slab where that is little."""
    length = slab.stop - slab.start
    if not step.cut or length < 64 * step.cut or length * step.row_elements <= 1 << 12:
        return [slab]
    quarter = length // 4 // step.cut * step.cut
    run = max(1, quarter // 16 // step.cut) * step.cut
    # where each run lies in its quarter walks through the quarter, so that no period of the rows is met again and again
    starts = (slab.start + index * quarter + (index * 5 + slab.start // length * 3) % 15 * run for index in range(4))
    return [slice(start, start + run) for start in starts]


class Measured:
    """A value computed once, from a scan of everything that some steps read, when it is first asked for; `passes`: how often it goes over that, about."""

    def __init__(self, statistic: Callable[[Scan], Any], label: str = "", whole_model: bool = False, passes: int = 1) -> None:
        self.statistic, self.label, self.whole_model, self.passes = statistic, label, whole_model, passes
        self.steps: list[Step] = []
        self._lock = threading.Lock()
        self._value: Any = None
        self._known = False

    def get(self, held: Sequence[Tensor] | None = None, parallel: ParallelMap = map, recall: Recall = lambda compute: compute()) -> Any:
        """The value; `held` saves reading again when the one step's tensors are in memory already."""
        with self._lock:
            if not self._known:
                self._value = self.statistic(Scan(self.steps, None if self.whole_model else held, parallel, recall))
                self._known = True
            return self._value

    @property
    def made(self) -> Any:
        """The value; for `adopt` of the same measurement in another process."""
        return self.get()

    def adopt(self, made: Any) -> None:
        """Take the value as it was measured elsewhere."""
        with self._lock:
            self._value, self._known = made, True
