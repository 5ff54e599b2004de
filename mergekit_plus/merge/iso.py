"""Isotropic merging: the sum of the task matrices with all its singular values alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .combine import weighted_sum
from .method import Lambda, merge_method, task_vectors
from .spectral import by_matrix, orthogonal, parts

Common = Annotated[float, Field(ge=0, le=1, description="share of the directions that are the sum's; the rest go to the tasks in equal parts")]


@merge_method("iso_c", unit="tensor")
def iso_c(base: Tensor, models: Sequence[Tensor], *, lambda_: Lambda = 1.0) -> Tensor:
    """The base plus `lambda` times the sum of the task matrices, with their singular values replaced by the mean of these.

    `mean(S) U V` with `U S V = sum of d_i`. Biases, norms and other tensors that are no matrices are averaged; embeddings and heads are
    matrices like others, and a tensor of three dimensions is a stack of them. Directions with a singular value of zero stay zero and do
    not count in the mean, where the released code fills them with arbitrary ones; that matters for low-rank fine-tunes. Whole
    tensors are held in memory. Source: Iso-C of arXiv 2502.04959 as in its released code (danielm1405/iso-merging).
    """
    vectors = list(task_vectors(base, models))
    merged = by_matrix(vectors, _isotropic)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


@merge_method("iso_cts", unit="tensor")
def iso_cts(base: Tensor, models: Sequence[Tensor], *, common: Common = 0.8, lambda_: Lambda = 1.0) -> Tensor:
    """The base plus `lambda` times an isotropic matrix of the leading directions of the sum and, beside them, of each task.

    The trailing directions of the sum of the task matrices make room for `round((1 - common) r / N)` of each of the N tasks, the leading
    ones of what the sum's directions leave of its matrix; all of them are made orthogonal and get the mean of their singular
    values. The rest as in iso_c. Source: Iso-CTS of arXiv 2502.04959 as in its released code (danielm1405/iso-merging), whose default
    0.8 for `common` this is.
    """
    vectors = list(task_vectors(base, models))
    merged = by_matrix(vectors, lambda matrices: _common_and_specific(matrices, common))
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


def _isotropic(matrices: Sequence[Tensor]) -> Tensor:
    u, s, v = parts(_sum(matrices))
    return (u @ v).mul_(s.mean() if s.numel() else 0)


def _common_and_specific(matrices: Sequence[Tensor], common: float) -> Tensor:
    count, size = len(matrices), min(matrices[0].shape)
    own = min(round((size - int(size * common)) / count), size // count)
    shared = parts(_sum(matrices), size - own * count)
    u = shared[0]
    found = [shared, *(parts(matrix - u @ (u.T @ matrix), own, matrix.norm()) for matrix in matrices)]
    left, values, right = zip(*found, strict=True)
    s = torch.cat(values)
    return (orthogonal(torch.cat(left, 1)) @ orthogonal(torch.cat(right).T).T).mul_(s.mean() if s.numel() else 0)


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    return weighted_sum((matrix.clone() for matrix in matrices), [1.0] * len(matrices))
