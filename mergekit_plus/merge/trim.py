"""Which elements of a task vector stay, by their magnitude: found by selection over a tensor or a model, applied to any piece of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..statistics import Cut, Scan, largest, order_statistics, sums
from .method import task_vectors


@dataclass(frozen=True)
class Band:
    """`kept` elements after the `skipped` largest."""

    kept: int
    skipped: int = 0


@dataclass(frozen=True)
class Trim:
    """The elements within `cut` stay, without those within `without`; multiplied by `factor`."""

    cut: Cut
    factor: float = 1.0
    without: Cut | None = None


NOTHING = Trim(Cut(math.inf, -1, 0))


def trims(scan: Scan, bands: Sequence[Band | None], rescale: bool) -> tuple[Trim | None, ...]:
    """For each task vector how its band is cut out of it; None where all of it stays. Of equal magnitudes the first count as the larger.

    rescale: with the factor that restores the L1 norm. One pass, or few.
    """
    wanted = [(index, count) for index, band in enumerate(bands) if band and band.kept for count in (band.kept + band.skipped, band.skipped) if count]
    found: list[Trim | None] = [NOTHING if band else None for band in bands]
    if not wanted:
        return tuple(found)

    def magnitudes(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        assert base is not None
        rows = {index: vector.abs_() for index, vector in enumerate(task_vectors(base, models))}
        return [rows[index] for index, _ in wanted]

    cuts = largest(scan, magnitudes, [count for _, count in wanted])
    norms = [(1.0, 1.0)] * len(wanted)  # of the whole vector, and of what lies within the cut
    if rescale:

        def totals(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
            rows = magnitudes(base, models)
            above = [hardshrink(row, cut.threshold) for row, cut in zip(rows, cuts, strict=True)]
            return [float(row.sum(dtype=torch.float64)) for row in (*rows, *above)]

        summed = sums(scan, totals)
        norms = [(whole, above + cut.tied * cut.threshold) for cut, whole, above in zip(cuts, summed, summed[len(wanted) :], strict=False)]
    for index in dict.fromkeys(index for index, _ in wanted):
        cut, *without = [cut for (owner, _), cut in zip(wanted, cuts, strict=True) if owner == index]
        (whole, within), *skipped = [norm for (owner, _), norm in zip(wanted, norms, strict=True) if owner == index]
        kept = within - skipped[0][1] if skipped and rescale else within
        found[index] = Trim(cut, whole / kept if kept > 0 else 1.0, without[0] if without else None)
    return tuple(found)


def thresholds(scan: Scan, counts: Sequence[int | None]) -> tuple[Trim | None, ...]:
    """For each task vector the cut that keeps its `counts[i] >= 1` largest elements, and all that tie with the least of them; None keeps all."""
    which = [index for index, count in enumerate(counts) if count is not None]

    def magnitudes(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        assert base is not None
        return [vector.abs_() for index, vector in enumerate(task_vectors(base, models)) if index in which]

    ranks = [[scan.size - count] for count in counts if count is not None]
    found = iter(order_statistics(scan, magnitudes, ranks) if ranks else ())
    return tuple(None if count is None else Trim(Cut(next(found)[0], scan.size, 0)) for count in counts)


def trimmed_vectors(base: Tensor, models: Sequence[Tensor], measured: Sequence[Trim | None], first: int) -> Iterator[Tensor]:
    """The task vectors, new, each trimmed as measured; the tensors are pieces that begin at flat index `first`."""
    for vector, trim in zip(task_vectors(base, models), measured, strict=True):
        yield _trimmed(vector, trim, first)


def _trimmed(vector: Tensor, trim: Trim | None, first: int) -> Tensor:
    """The piece of a task vector that begins at flat index `first`, with zeros where it does not stay."""
    if trim is None:
        return vector
    kept = _within(vector, trim.cut, first)
    if trim.without is not None:
        kept = kept.sub_(_within(vector, trim.without, first))
    return kept if trim.factor == 1 else kept.mul_(trim.factor)


def _within(vector: Tensor, cut: Cut, first: int) -> Tensor:
    above = cut.threshold
    number = np.float64 if vector.dtype == torch.float64 else np.float32
    from_it_on = float(np.nextafter(number(above), number(-math.inf)))  # hardshrink keeps what is larger than its argument
    split = cut.last + 1 - first
    if split >= vector.numel():
        return hardshrink(vector, from_it_on)
    if split <= 0:
        return hardshrink(vector, above)
    flat = vector.reshape(-1)
    return torch.cat([hardshrink(flat[:split], from_it_on), hardshrink(flat[split:], above)]).view(vector.shape)
