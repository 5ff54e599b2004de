"""Consensus task arithmetic: what too few of the models claim is taken out of the sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .combine import weighted_sum
from .method import Lambda, PerModel, merge_method, task_vectors

MaskLambda = Annotated[float, Field(ge=0, description="a model claims an element where its task vector is larger than this times what the sum adds to it")]
K = Annotated[int, Field(ge=0, description="how many models must claim an element: 2 leaves out what one alone wants, 1 what none wants")]


@merge_method("consensus")
def consensus(
    base: Tensor, models: Sequence[Tensor], *, mask_lambda: PerModel[MaskLambda] = (0.4,), k: K = 2, lambda_: Lambda = 1.0
) -> Tensor:
    """The base plus `lambda` times the sum of the task vectors, where at least `k` models claim the element.

    The TALL mask of model i holds where `|d_i| > mask_lambda_i |sum of d_j - d_i|`. The authors choose `mask_lambda` for each model from 0.2,
    0.3, ... 0.6 by validation, and `lambda` likewise; 0.4 is the middle. One model has nobody to agree with: with k = 2 the base stays.
    Source: Consensus TA of arXiv 2405.07813 as in its released code (nik-dim/tall_masks, without its TIES variant).
    """
    vectors = list(task_vectors(base, models))
    total = weighted_sum((vector.clone() for vector in vectors), [1.0] * len(vectors))
    claims = torch.zeros(total.shape, dtype=torch.int32, device=total.device)
    for vector, scale in zip(vectors, mask_lambda, strict=True):
        claims += vector.abs() > (total - vector).abs_().mul_(scale)
    return total.mul_(claims >= k).mul_(lambda_).add_(base.to(total.dtype))
