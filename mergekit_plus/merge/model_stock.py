"""Model Stock: how far to go from the base towards the models' mean, by the angle between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .combine import offsets, weighted_sum
from .method import Scan, merge_method, task_vectors
from .sphere import cosine, cosines, gram, row_products

FilterWise = Annotated[bool, Field(description="an angle for each row (along the last dimension) instead of one for the tensor")]


def angle(scan: Scan, *, filter_wise: bool) -> float | None:
    """The mean cosine between the task vectors; None where it is taken row by row as they are merged. One pass."""
    if filter_wise:
        return None
    found = cosines(gram(scan, offsets))
    pairs = list(combinations(range(len(found)), 2))
    return sum(float(found[pair]) for pair in pairs) / max(1, len(pairs))


@merge_method("model_stock", unit="row", statistic=angle, models=(2, None))
def model_stock(base: Tensor, models: Sequence[Tensor], *, measured: float | None, filter_wise: FilterWise = False) -> Tensor:
    """The point between the base and the mean of N models at `t = N c / (1 + (N-1) c)`, with the mean cosine c between their task vectors.

    Tensor by tensor, or row by row. Where c is negative the estimate means nothing, and the base stays; mergekit goes the other way,
    without bound near c = -1/(N-1). mergekit computes in the dtype of the inputs; here the angles are float64. Source: arXiv 2403.19522
    as in mergekit 0.1.5. Equal models give that model.
    """
    vectors = list(task_vectors(base, models))
    count = len(vectors)
    if measured is None:
        pairs = [cosine(row_products(a, b), row_products(a, a), row_products(b, b)) for a, b in combinations(vectors, 2)]
        mean = torch.stack(pairs).mean(0).clamp_(min=0)
    else:
        mean = torch.tensor(max(0.0, measured), dtype=torch.float64)
    share = (mean / (1 + (count - 1) * mean)).to(vectors[0])  # t / N
    merged = weighted_sum(vectors, [1.0] * count)
    return merged.mul_(share).add_(base.to(merged.dtype))
