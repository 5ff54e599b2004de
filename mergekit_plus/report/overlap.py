"""How alike what two fine-tunes changed is: whether a merge of them has anything to weigh up."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ..checkpoint import Checkpoint
from ..model import describe

TOP = 0.2  # the share of a weight's elements, those that changed most, that overlap is told of


@dataclass(frozen=True)
class Overlap:
    """Two models' changes of a base's linear weights.

    cosine: of the two changes, all weights as one vector. shared: of the fifth of each weight that one model changed most, the share that is among the
    fifth that the other did (0.2 where they have nothing to do with each other). conflict: of those, the share that go in opposite directions (0.5 by chance).
    """

    first: str
    second: str
    cosine: float
    shared: float
    conflict: float


def overlaps(base: Checkpoint, models: Mapping[str, Checkpoint]) -> tuple[Overlap, ...]:
    """Every pair of models, a weight of each in memory at a time, in float32; weights that one lacks, or has in another shape, are left out."""
    weights = [
        name for name in describe(base).linears
        if all(name in model.specs and model.specs[name].shape == base.specs[name].shape for model in models.values())
    ]  # fmt: skip
    pairs = list(itertools.combinations(models, 2))
    sums = {pair: [0.0] * 6 for pair in pairs}
    for name in weights:
        start = base.read(name).float()
        changes = {own: model.read(name).float() - start for own, model in models.items()}
        tops = {own: _top(change) for own, change in changes.items()}
        for first, second in pairs:
            a, b = changes[first], changes[second]
            both = tops[first] & tops[second]
            found = [(a * b).sum(), a.square().sum(), b.square().sum(), both.sum(), tops[first].sum(), ((a * b < 0) & both).sum()]
            sums[first, second] = [total + float(value) for total, value in zip(sums[first, second], found, strict=True)]
    return tuple(_overlap(pair, sums[pair]) for pair in pairs) if weights else ()


def _top(change: Tensor) -> Tensor:
    """The elements that changed most: a fifth of them, and none that did not change."""
    size = change.abs().flatten()
    least = size.kthvalue(max(1, size.numel() - int(TOP * size.numel()) + 1)).values if int(TOP * size.numel()) else size.max()
    return (change.abs() >= least) & (change != 0)


def _overlap(pair: Sequence[str], sums: Sequence[float]) -> Overlap:
    dot, first, second, both, top, against = sums
    return Overlap(pair[0], pair[1], dot / sqrt(first * second) if first and second else 0.0, both / top if top else 0.0, against / both if both else 0.0)

