"""The mean of models on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .combine import blend, offsets
from .method import Scan, merge_method
from .sphere import gram, karcher_mean

MaxIter = Annotated[int, Field(ge=0, description="most steps towards the mean")]
Tol = Annotated[float, Field(gt=0, description="angles, steps and norms below this are zero")]


def measure(scan: Scan, *, max_iter: int, tol: float) -> list[float]:
    """How much of each model goes in."""
    return karcher_mean(gram(scan, offsets), max_iter, tol)


@merge_method("karcher", statistic=measure)
def karcher(models: Sequence[Tensor], *, measured: Sequence[float], max_iter: MaxIter = 10, tol: Tol = 1e-5) -> Tensor:
    """The Karcher mean of the models' directions, each tensor one vector, at their mean length.

    From the mean direction, steps of the exponential map along the mean of the logarithms, `m <- cos|v| m + sin|v| v / |v|`, until they
    are shorter than `tol`. All of it happens in the span of the models, on their N x N inner products in float64; mergekit iterates on
    the tensors in their dtype. A zero tensor has no direction but counts in the mean length. Source: arXiv 2603.04972 as in mergekit
    0.1.5; it takes no weights. Equal models give that model.
    """
    return blend(models, [1.0] if len(models) == 1 else measured)
