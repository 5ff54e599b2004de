"""Arcee Fusion: take from a model what is important in it, by how its rows differ from the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..statistics import order_statistics
from .method import Scan, merge_method, task_vectors

EPS = 1e-8  # added to the probabilities


def threshold(scan: Scan) -> float:
    """The median of the importances plus one and a half times the distance of the quartiles, of a whole tensor. One pass, or few."""
    last = scan.size - 1
    if last < 0:
        return 0.0
    ((low, median, high),) = order_statistics(scan, lambda base, models: [importance(base, models)], [[last // 4, last // 2, 3 * last // 4]])
    return median + 1.5 * (high - low)


def importance(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """`|d|` times the Kullback-Leibler divergence of the row's softmax from the base's, in the working dtype."""
    assert base is not None
    (vector,) = task_vectors(base, models)
    p, q = (tensor.to(torch.float64).softmax(-1) + EPS for tensor in (models[0], base))
    return vector.abs_().mul_((p * (p / q).log_()).sum(-1, keepdim=True))


@merge_method("arcee_fusion", unit="row", statistic=threshold, models=(1, 1))
def arcee_fusion(base: Tensor, models: Sequence[Tensor], *, measured: float) -> Tensor:
    """The model's elements where they are important, the base's elsewhere.

    Important is an element of a tensor whose `|m - b| KL(softmax(m) || softmax(b))`, with the softmax of its row (along the last
    dimension), is at least the median plus 1.5 times the distance of the quartiles. The quartiles are exact; mergekit draws a million
    elements without a seed, divides probabilities of 16 bits, and writes float32 whatever dtype was asked for. Source: mergekit 0.1.5.
    """
    important = importance(base, models) >= measured
    (vector,) = task_vectors(base, models)
    return vector.mul_(important).add_(base.to(vector.dtype))
