"""TIES: trim each task vector, elect a sign for each element, merge those that agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..statistics import Cut, largest, sums
from .combine import sign_consensus
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Rescale, Scan, Weight, merge_method, task_vectors


@dataclass(frozen=True)
class Trim:
    """Which elements of a task vector stay, and what they are multiplied by."""

    cut: Cut
    factor: float = 1.0


def trims(scan: Scan, *, density: Sequence[float], rescale: bool = False) -> tuple[Trim | None, ...]:
    """For each model the cut that keeps `max(1, int(density * size))` elements; None where all stay. One pass, or few."""
    which = [index for index, share in enumerate(density) if share < 1] if scan.size else []
    found: list[Trim | None] = [None] * len(density)
    if not which:
        return tuple(found)

    def magnitudes(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        assert base is not None
        return [vector.abs_() for index, vector in enumerate(task_vectors(base, models)) if density[index] < 1]

    cuts = largest(scan, magnitudes, [max(1, int(density[index] * scan.size)) for index in which])
    factors = [1.0] * len(which)
    if rescale:

        def norms(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
            rows = magnitudes(base, models)
            above = [hardshrink(row, cut.threshold) for row, cut in zip(rows, cuts, strict=True)]
            return [float(row.sum(dtype=torch.float64)) for row in (*rows, *above)]

        totals = sums(scan, norms)
        for place, (cut, whole, above) in enumerate(zip(cuts, totals, totals[len(which) :], strict=False)):
            kept = above + cut.tied * cut.threshold
            factors[place] = whole / kept if kept else 1.0
    for index, cut, factor in zip(which, cuts, factors, strict=True):
        found[index] = Trim(cut, factor)
    return tuple(found)


def trimmed(vector: Tensor, trim: Trim | None, first: int) -> Tensor:
    """The piece of a task vector that begins at flat index `first`, with zeros where it is not among the largest."""
    if trim is None:
        return vector
    above = trim.cut.threshold
    number = np.float64 if vector.dtype == torch.float64 else np.float32
    from_it_on = float(np.nextafter(number(above), number(-math.inf)))  # hardshrink keeps what is larger than its argument
    split = trim.cut.last + 1 - first
    if split >= vector.numel():
        kept = hardshrink(vector, from_it_on)
    elif split <= 0:
        kept = hardshrink(vector, above)
    else:
        flat = vector.reshape(-1)
        kept = torch.cat([hardshrink(flat[:split], from_it_on), hardshrink(flat[split:], above)]).view(vector.shape)
    return kept if trim.factor == 1 else kept.mul_(trim.factor)


@merge_method("ties", statistic=trims, linear=("lambda",))
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Trim | None],
    first: int = 0,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    normalize: Normalize = True,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus `lambda` times the mean of the trimmed task vectors that agree with the majority's sign.

    Of each tensor's task vector exactly `max(1, int(density * size))` elements stay: the largest, and of equal ones those with
    the lowest flat index (mergekit takes whichever an unstable sort puts first). The sign of the weighted sum is elected, zero
    elects +; `normalize` divides by the weights that agree. `rescale` restores the L1 norm of each trimmed vector.
    `int8_mask` has no effect. Source: arXiv 2306.01708, per tensor as in mergekit. Equal models with density 1 give that model.
    """
    vectors = (trimmed(vector, trim, first) for vector, trim in zip(task_vectors(base, models), measured, strict=True))
    merged = sign_consensus(vectors, weight, normalize)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))
