"""SCE: select the elements that vary between the models, calculate a weight for each model, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..statistics import order_statistics, sums
from .method import Int8Mask, Scan, merge_method, task_vectors

TopK = Annotated[float, Field(ge=0, le=1, description="share of the elements that differ between the models that is kept, the most varying")]


@dataclass(frozen=True)
class Selection:
    """The least variance that stays, and the weight of each model; None where nothing stays, or there is nothing to merge."""

    variance: float | None
    weights: tuple[float, ...] | None


def select(scan: Scan, *, select_topk: float) -> Selection:
    """The cut of the variances and the mean squares of what it leaves. Up to four passes; one where everything stays."""
    least = 0.0
    if select_topk < 1:
        differing = sums(scan, lambda base, models: [float(torch.count_nonzero(_variance(_vectors(base, models))))])
        count = int(differing[0] * select_topk)
        if not count:
            return Selection(None, None)
        ((least,),) = order_statistics(scan, lambda base, models: [_variance(_vectors(base, models))], [[scan.size - count]])

    def squares(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
        return [float(vector.double().square_().sum()) for vector in _selected(_vectors(base, models), least)]

    energy = sums(scan, squares)
    total = sum(energy)
    return Selection(least, tuple(value / total for value in energy) if total else None)


@merge_method("sce", statistic=select)
def sce(base: Tensor, models: Sequence[Tensor], *, measured: Selection, select_topk: TopK = 1.0, int8_mask: Int8Mask = False) -> Tensor:
    """The base plus the mean of the task vectors that agree with the majority's sign, where the models differ most, weighted by their energy.

    Select: of each tensor the elements with the largest variance between the task vectors stay, `int(select_topk * n)` of the n that vary
    and all that tie with the least of them. Calculate: a model's weight is its share of the sum of squares. Erase: the sign of the
    unweighted sum is elected, zero elects +. mergekit gives every model the same weight where the mean squares sum to less than 1e-6,
    which is so for most fine-tunes; here only where they are zero. `int8_mask` has no effect. Source: arXiv 2408.07990 as in mergekit
    0.1.5, tensor by tensor. Equal models with select_topk 1 give that model.
    """
    vectors = _vectors(base, models)
    merged = torch.zeros_like(vectors[0])
    if measured.variance is not None and measured.weights is not None:
        vectors = _selected(vectors, measured.variance)
        total = _sum(vectors)
        sign = torch.ones_like(total).copysign_(total + 0.0)
        counted = torch.zeros_like(total)
        for vector, weight in zip(vectors, measured.weights, strict=True):
            agrees = vector.sign() == sign
            merged.add_(vector.mul_(agrees), alpha=weight)
            counted.add_(agrees, alpha=weight)
        merged.div_(counted.where(counted > 0, 1))
    return merged.add_(base.to(merged.dtype))


def _selected(vectors: list[Tensor], least: float) -> list[Tensor]:
    """The vectors with zeros where they vary less; taken over."""
    if least > 0:
        stays = _variance(vectors) >= least
        for vector in vectors:
            vector.mul_(stays)
    return vectors


def _variance(vectors: Sequence[Tensor]) -> Tensor:
    """Of each element, between the models: in float64, then rounded to float32, so that it is the same for any order of the models."""
    wide = [vector.double() for vector in vectors]
    mean = _sum(wide).div_(len(wide))
    return _sum([(vector - mean).square_() for vector in wide]).div_(len(wide)).float()


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def _vectors(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
    assert base is not None
    return list(task_vectors(base, models))
