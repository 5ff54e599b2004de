"""The base plus a weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .combine import refuse_zero_sum, shares, weighted_sum
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Rescale, Weight, merge_method, task_vectors


@merge_method("task_arithmetic", check=refuse_zero_sum, linear=("weight", "lambda"))
def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: PerModel[Weight] = (1.0,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: PerModel[Density] = (1.0,),
    rescale: Rescale = False,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus `lambda * sum of w_i (m_i - base)`.

    `density`, `rescale` and `int8_mask` have no effect here, as in mergekit, whose recipes carry them. Source: arXiv 2212.04089.
    Equal models with normalized weights give that model.
    """
    weights = [lambda_ * share for share in shares(weight, normalize)]
    merged = weighted_sum(task_vectors(base, models), weights)
    return merged.add_(base.to(merged.dtype))
