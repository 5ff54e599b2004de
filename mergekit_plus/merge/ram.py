"""RAM: what only one model changed is kept as it is, what several changed is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..statistics import sums
from .method import Scan, merge_method, task_vectors

Epsilon = Annotated[float, Field(ge=0, description="an element counts as changed where its task vector is larger than this")]
Strength = Annotated[float, Field(ge=0, description="how much a model's unique elements grow with its share of shared ones")]
Most = Annotated[float, Field(ge=0, description="the largest ratio of shared to unique elements that counts")]


def growth(scan: Scan, *, r: float, alpha: float, epsilon: float) -> list[float]:
    """By what each model's unique elements are multiplied: `1 + r min(shared / unique, alpha)`, tensor by tensor. One pass."""

    def counts(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
        assert base is not None
        changed = [vector.abs_() > epsilon for vector in task_vectors(base, models)]
        owners = _count(changed)
        return [float(torch.count_nonzero(one & found)) for found in (owners > 1, owners == 1) for one in changed]

    totals = sums(scan, counts)
    half = len(totals) // 2
    return [
        1 + r * (min(shared / unique, alpha) if unique else alpha if shared else 0.0)
        for shared, unique in zip(totals[:half], totals[half:], strict=True)
    ]


@merge_method("ram")
def ram(base: Tensor, models: Sequence[Tensor], *, epsilon: Epsilon = 1e-5) -> Tensor:
    """The base plus, for each element, the mean of the task vectors that changed it.

    A change is a difference larger than `epsilon`; smaller ones are dropped. Source: arXiv 2601.13572 as in mergekit 0.1.5.
    Equal models give that model, but for changes smaller than `epsilon`.
    """
    return _reinforced(base, models, [1.0] * len(models), epsilon)


@merge_method("ramplus_tl", statistic=growth)
def ramplus_tl(
    base: Tensor, models: Sequence[Tensor], *, measured: Sequence[float], r: Strength = 0.1, alpha: Most = 0.2, epsilon: Epsilon = 1e-5
) -> Tensor:
    """The base plus, for each element, the mean of the task vectors that changed it; unique changes of a model that shares many are made larger.

    What only model i changed is multiplied by `1 + r min(shared_i / unique_i, alpha)`, counted tensor by tensor; without unique changes
    the ratio is `alpha`. Source: RAM+ of arXiv 2601.13572, tensor-local as in mergekit 0.1.5.
    """
    return _reinforced(base, models, measured, epsilon)


def _reinforced(base: Tensor, models: Sequence[Tensor], unique: Sequence[float], epsilon: float) -> Tensor:
    """The sum of the changes over their number, each unique one times its model's factor."""
    vectors = list(task_vectors(base, models))
    changed = [vector.abs() > epsilon for vector in vectors]
    owners = _count(changed)
    alone = owners == 1
    merged = torch.zeros_like(vectors[0])
    for vector, one, factor in zip(vectors, changed, unique, strict=True):
        vector.mul_(one)
        merged += vector if factor == 1 else torch.where(alone, vector * factor, vector)
    return merged.div_(owners.clamp_(min=1)).add_(base.to(merged.dtype))


def _count(masks: Sequence[Tensor]) -> Tensor:
    """How many of the masks hold, for each element."""
    total = torch.zeros(masks[0].shape, dtype=torch.int32, device=masks[0].device)
    for mask in masks:
        total += mask
    return total
