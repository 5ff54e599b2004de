"""One unit of a save: some rows of a step computed, looked at, and put into the place that they have in the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Rows
from .finite import is_finite
from .layout import SaveOptions, bytes_of
from .plan import Step, execute, of_inner, proportional
from .spec import TensorSpec


class Sink(Protocol):
    """Takes tensors, at any byte of the place of one."""

    def write(self, tensor: Tensor, name: str, at: int = 0) -> None: ...


def write_unit(step: Step, rows: Rows | None, where: Mapping[str, Sink], options: SaveOptions) -> None:
    """Compute these rows of a step, a slab at a time, and put what it writes where `where` says. Errors: CheckpointError for values that are not finite."""
    for part in step.slabs(rows=rows) if rows is not None else [None]:
        _write_rows(step, part, where, options)


def _write_rows(step: Step, rows: Rows | None, where: Mapping[str, Sink], options: SaveOptions) -> None:
    for spec, tensor in zip(step.writes, execute(step, rows), strict=True):
        if not options.allow_nonfinite and spec.is_float and not is_finite(tensor):
            raise CheckpointError(_explain_nonfinite(step, rows, spec.name))
        where[spec.name].write(tensor, spec.name, _first(step, rows, spec) * spec.row_bytes)
    options.progress.advance(sum(bytes_of(spec.nbytes, step, rows) for spec in step.writes))


def written_by(step: Step, rows: Rows | None) -> Iterator[tuple[TensorSpec, int, int]]:
    """What a unit writes: the tensor, the byte of it at which that begins, and how many bytes."""
    for spec in step.writes:
        yield spec, _first(step, rows, spec) * spec.row_bytes, bytes_of(spec.nbytes, step, rows)


def _first(step: Step, rows: Rows | None, spec: TensorSpec) -> int:
    """The first row of a write that goes with these rows of its step."""
    return 0 if rows is None else proportional(rows, step.rows, spec.rows).start


def _explain_nonfinite(step: Step, rows: Rows | None, name: str) -> str:
    """Which input brought the value in, or which result is where it arose."""
    for feed in step.feeds:
        whole = rows is None or feed.take is not None
        tensor = feed.checkpoint.read(feed.name, None if rows is None or whole else proportional(rows, step.rows, feed.spec.rows))
        if not tensor.is_floating_point() or is_finite(tensor.to(torch.float64)):
            continue
        if feed.step is not None:
            return _explain_nonfinite(feed.step, of_inner(step, feed.step, rows, whole), feed.name)
        return f"{feed.checkpoint.label}: {feed.name} holds values that are NaN or infinite; mend the model, or carry them with --allow-nonfinite"
    return f"{name}: the result has NaN or infinite values although the inputs have none: it overflows its dtype; try --dtype float32"
