"""The unified model of EMR-Merging: for each element the largest magnitude of those that have the elected sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .combine import weighted_sum
from .method import Lambda, merge_method, task_vectors


@merge_method("emr")
def emr(base: Tensor, models: Sequence[Tensor], *, lambda_: Lambda = 1.0) -> Tensor:
    """The base plus `lambda` times, for each element, the task vectors' largest magnitude with the sign of their sum.

    This is the "elect" of EMR-Merging, its unified task vector. The masks and rescalers, with which the paper restores each single task at
    inference, have no place in one checkpoint, and its results are not those of this model alone. A sum of zero elects -, as in the
    released code. Source: arXiv 2405.17461 (harveyhuang18/EMR_Merging). Equal models give that model.
    """
    vectors = list(task_vectors(base, models))
    total = weighted_sum((vector.clone() for vector in vectors), [1.0] * len(vectors))
    sign = torch.where(total > 0, 1.0, -1.0).to(total.dtype)
    elected = torch.zeros_like(total)
    for vector in vectors:
        elected = torch.maximum(elected, vector.mul_(sign))
    return elected.mul_(sign).mul_(lambda_).add_(base.to(total.dtype))
