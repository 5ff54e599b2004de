"""A plan: steps that compute tensors from other checkpoints when they are asked for, run by run of their rows.

A `Step` = what it reads, one pure function, what it writes. `execute` runs one, and the steps behind it, on the rows that are wanted;
a `Plan` is the source whose tensors are what its steps write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import gcd, lcm
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Rows, rows_of
from .dtypes import TORCH_DTYPES
from .rows import pick_rows
from .spec import TensorSpec

if TYPE_CHECKING:
    from .scan import Measured

PIECE = 1 << 20  # elements given to a step's function at once: few enough for the caches, enough that threads do not queue for Python's lock
SLAB = 1 << 22  # elements of a tensor read and written at once

Read = tuple[Checkpoint, str]
Take = Literal["whole"] | Tensor | None  # how a run of a step's rows is fed from a read, see `Step`


class Run(Protocol):
    """The pure function of a step: rows of what it reads in, rows of what it writes out."""

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]: ...


@dataclass(frozen=True, eq=False)
class Step:
    """Read these, call one pure function, get those.

    `multiple` says how the step may be fed: 0 = whole tensors only; k = any run of rows from one multiple of k to another or to the
    end, rows being counted along the first write. A tensor with fewer rows is cut in proportion (packed zero points), one of a single
    row goes whole with every run; so the first write must be the one with the most rows. `measured` is what the function must know of
    more than these rows.

    `takes` says it for reads that are fed otherwise, one entry for each read: "whole" for what every run gets whole (the A of a low-rank
    product B A), or the rows dealt out anew, int64 [rows of the first write] with -1 for a row of zeros (an embedding in another
    vocabulary's order). None is the rule above.
    """

    reads: tuple[Read, ...]
    writes: tuple[TensorSpec, ...]
    run: Run
    multiple: int = 0
    measured: Measured | None = None
    takes: tuple[Take, ...] = ()  # none at all where every read is fed by the rule

    @property
    def rows(self) -> int:
        """Rows of the first write, by which the step is cut."""
        return self.writes[0].rows

    @cached_property
    def feeds(self) -> tuple[Feed, ...]:
        """Its reads, each with how it is fed and the step that computes it."""
        takes = self.takes or (None,) * len(self.reads)
        return tuple(Feed(checkpoint, name, take) for (checkpoint, name), take in zip(self.reads, takes, strict=True))

    @cached_property
    def read_specs(self) -> tuple[TensorSpec, ...]:
        """What it reads, as its function gets it."""
        return tuple(feed.spec for feed in self.feeds)

    @cached_property
    def row_elements(self) -> int:
        """Elements in one row of the widest tensor that it reads in rows or writes."""
        cut = (feed.spec for feed in self.feeds if not feed.whole)
        return max(1, max(spec.numel for spec in (*cut, *self.writes)) // max(1, self.rows))

    @cached_property
    def cut(self) -> int:
        """`multiple` when what it reads is computed too: the multiples of all steps behind it, 0 when one wants whole tensors."""
        return lcm(self.multiple, *(feed.cut(self.rows) for feed in self.feeds))

    def may_run(self, rows: Rows) -> bool:
        """Whether it can be run on these rows alone."""
        return self.cut > 0 and rows.start % self.cut == 0 and (rows.stop % self.cut == 0 or rows.stop == self.rows)

    @cached_property
    def behind(self) -> tuple[tuple[Step, bool], ...]:
        """The steps that compute what it reads, and whether it reads them whole."""
        found = {(id(feed.step), feed.whole): feed.step for feed in self.feeds if feed.step is not None}
        return tuple((step, whole) for (_, whole), step in found.items())

    @cached_property
    def measures_tensor(self) -> bool:
        """Whether it, or a step behind it, first goes over the whole of this one tensor."""
        own = self.measured is not None and not self.measured.whole_model
        return own or any(inner.measures_tensor for inner, _ in self.behind)

    def slabs(self, elements: int | None = None, rows: Rows | None = None) -> list[Rows]:
        """These rows (by default all) cut into runs of about so many elements (by default `SLAB`)."""
        start, stop = (0, self.rows) if rows is None else (rows.start, rows.stop)
        if not self.cut:
            return [slice(start, stop)]
        size = max(1, (elements or SLAB) // self.row_elements // self.cut) * self.cut
        return [slice(first, min(first + size, stop)) for first in range(start, stop, size)] or [slice(start, stop)]


@dataclass(frozen=True, eq=False)
class Feed:
    """A read of a step, and how it is fed: see `Step.takes`."""

    checkpoint: Checkpoint
    name: str
    take: Take

    @property
    def whole(self) -> bool:
        """Whether every run gets all of it."""
        return isinstance(self.take, str)

    @cached_property
    def spec(self) -> TensorSpec:
        """The tensor as the step's function gets it."""
        spec = self.checkpoint.specs[self.name]
        return replace(spec, shape=(len(self.take), *spec.shape[1:])) if isinstance(self.take, Tensor) else spec

    @cached_property
    def step(self) -> Step | None:
        """The step that computes it, if one does."""
        return self.checkpoint.source.step_of[self.name] if isinstance(self.checkpoint.source, Plan) else None

    def cut(self, rows: int) -> int:
        """The multiple along `rows` rows that it allows; 0 where only the whole of it can be had."""
        if self.step is None or self.whole:
            return 1
        return int(self.step.cut == 1) if isinstance(self.take, Tensor) else _along(self.step.cut, self.step.rows, rows)


def proportional(rows: Rows, of: int, to: int) -> Rows:
    """The rows of a tensor of `to` rows that go with these rows of one of `of` rows; a single row goes with all of them."""
    if of == to:
        return rows
    if to == 1:
        return slice(0, 1)
    return slice(rows.start * to // max(1, of), to if rows.stop == of else rows.stop * to // of)


def _along(multiple: int, of: int, to: int) -> int:
    """The least multiple along `to` rows whose proportion of `of` rows is this multiple."""
    if of in (to, 1) or not multiple:
        return multiple
    return multiple * max(1, to) // gcd(multiple * max(1, to), max(1, of))


def execute(step: Step, rows: Rows | None = None) -> list[Tensor]:
    """Run a step on these rows (all of them by default), piece by piece; one tensor for each write.

    Errors: ValueError where the step's function does not yield what the step says that it writes.
    """
    if not step.cut:
        tensors = gather(step, None)
        results = _run(step, tensors, slice(0, step.rows), _measured(step, tensors))
        return results if rows is None else _parts(step, step.writes, results, rows, slice(0, step.rows))
    measured = None if rows is None else _measured(step, None)  # reads on its own, before these rows are held too
    tensors = gather(step, rows)
    if rows is None:
        measured = _measured(step, tensors)
    whole = slice(0, step.rows) if rows is None else rows
    cuts = pieces(step, whole)
    if len(cuts) == 1 or is_copy(step):
        return _run(step, tensors, whole, measured)
    outputs = [torch.empty(spec.slice_shape(_of_write(step, spec, whole)), dtype=TORCH_DTYPES[spec.dtype]) for spec in step.writes]
    for piece in cuts:
        parts = read_parts(step, tensors, piece, whole)
        for output, result in zip(_parts(step, step.writes, outputs, piece, whole), _run(step, parts, piece, measured), strict=True):
            output.copy_(result)
    return outputs


def pieces(step: Step, rows: Rows) -> list[Rows]:
    """These rows cut into what the step's function is given at once."""
    return step.slabs(PIECE, rows)


def _measured(step: Step, held: Sequence[Tensor] | None) -> Any:
    return None if step.measured is None else step.measured.get(held)


def _run(step: Step, tensors: Sequence[Tensor], rows: Rows, measured: Any) -> list[Tensor]:
    """Call the step's function and check what it yields: a wrong dtype or shape would be written over the neighbouring tensors."""
    results = list(step.run(tensors, rows.start, measured))
    for spec, result in zip(step.writes, results, strict=True):
        if spec.dtype in TORCH_DTYPES:
            dtype, shape = TORCH_DTYPES[spec.dtype], spec.slice_shape(_of_write(step, spec, rows))
        else:
            dtype, shape = torch.uint8, (spec.nbytes,)
        if result.dtype != dtype or result.shape != shape:
            raise ValueError(f"{spec.name}: the step must yield {dtype} {tuple(shape)}, not {result.dtype} {tuple(result.shape)}")
    return results


def _of_write(step: Step, spec: TensorSpec, rows: Rows) -> Rows:
    return proportional(rows, step.rows, spec.rows)


def _within(step: Step, spec: TensorSpec, piece: Rows, whole: Rows) -> Rows:
    """The rows of a tensor that go with a piece, counted from where `whole` begins."""
    inner, outer = proportional(piece, step.rows, spec.rows), proportional(whole, step.rows, spec.rows)
    return slice(inner.start - outer.start, inner.stop - outer.start)


def _parts(step: Step, specs: Sequence[TensorSpec], tensors: Sequence[Tensor], piece: Rows, whole: Rows) -> list[Tensor]:
    """Views of the rows of each tensor that go with a piece; the tensors begin where `whole` begins."""
    return [rows_of(tensor, spec, _within(step, spec, piece, whole)) for tensor, spec in zip(tensors, specs, strict=True)]


def read_parts(step: Step, tensors: Sequence[Tensor], piece: Rows, whole: Rows) -> list[Tensor]:
    """What a step has read, cut as `_parts` does, but for what goes whole."""
    parts = zip(tensors, _parts(step, step.read_specs, tensors, piece, whole), strict=True)
    return [tensor if feed.whole else part for feed, (tensor, part) in zip(step.feeds, parts, strict=True)]


def gather(step: Step, rows: Rows | None) -> list[Tensor]:
    """What a step reads; a step behind it that yields several of these runs once."""
    done: dict[tuple[int, bool], list[Tensor]] = {}
    tensors = []
    for feed, spec in zip(step.feeds, step.read_specs, strict=True):
        inner, whole = feed.step, feed.whole
        if isinstance(feed.take, Tensor):
            tensors.append(_dealt(feed, feed.take if rows is None else feed.take[rows], whole=not step.cut))
        elif inner is not None:
            if (id(inner), whole) not in done:
                done[id(inner), whole] = execute(inner, of_inner(step, inner, rows, whole))
            tensors.append(done[id(inner), whole][[write.name for write in inner.writes].index(feed.name)])
        else:
            tensors.append(feed.checkpoint.source.read(feed.name, None if rows is None or whole else proportional(rows, step.rows, spec.rows)))
    return tensors


def _dealt(feed: Feed, index: Tensor, whole: bool) -> Tensor:
    """Rows in another order; `whole` where a step behind may compute nothing less: once, not run by run."""
    read = feed.checkpoint.read(feed.name).__getitem__ if whole else partial(feed.checkpoint.read, feed.name)
    return pick_rows(read, feed.checkpoint.specs[feed.name], index)


def of_inner(step: Step, inner: Step, rows: Rows | None, whole: bool) -> Rows | None:
    """The rows of a step behind this one that these rows need."""
    return None if rows is None or whole else proportional(rows, step.rows, inner.rows)


class Plan:
    """A source whose tensors are computed when they are read."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = tuple(steps)
        self.specs: dict[str, TensorSpec] = {}
        self.step_of: dict[str, Step] = {}
        for step in self.steps:
            for write in step.writes:
                if write.name in self.specs:
                    raise CheckpointError(f"two steps of one plan write the tensor '{write.name}'")
                self.specs[write.name], self.step_of[write.name] = write, step

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        step, spec = self.step_of[name], self.specs[name]
        index = step.writes.index(spec)
        if rows is None or (spec.rows == step.rows and step.may_run(rows)):
            return execute(step, rows)[index]
        return rows_of(execute(step)[index], spec, rows)


def copy_step(checkpoint: Checkpoint, name: str, to: str | None = None) -> Step:
    """A step that hands a tensor on untouched, under its own name or another."""
    spec = checkpoint.specs[name]
    return Step(((checkpoint, name),), (replace(spec, name=to or name),), _copy, multiple=row_multiple(spec))


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A view of some of a checkpoint's tensors under other names, new ones to old ones; an old one may be taken several times."""
    return replace(checkpoint, source=Plan(copy_step(checkpoint, old, new) for new, old in names.items()))


def is_copy(step: Step) -> bool:
    """Whether a step hands its tensor on untouched."""
    return step.run is _copy


def row_multiple(spec: TensorSpec) -> int:
    """The `multiple` of a step that works row by row on this tensor: 0 where there are no rows to cut."""
    return 1 if spec.shape and spec.numel and spec.dtype in TORCH_DTYPES else 0


def _copy(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
    return tensors


def steps_of(checkpoint: Checkpoint) -> list[Step]:
    """The steps whose writes are the checkpoint's tensors: its plan's, or a copy of each tensor that lies somewhere."""
    if isinstance(checkpoint.source, Plan):
        return list(checkpoint.source.steps)
    return [copy_step(checkpoint, name) for name in checkpoint.specs]
