"""KnOTS: TIES in the directions that the tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .combine import sign_consensus
from .method import Lambda, PerModel, Weight, merge_method, task_vectors
from .spectral import by_matrix, parts

Kept = Annotated[float, Field(gt=0, le=1, description="share of each task's coordinates that is kept, the largest")]


@merge_method("knots", unit="tensor")
def knots(
    base: Tensor, models: Sequence[Tensor], *, weight: PerModel[Weight] = (1.0,), density: PerModel[Kept] = (0.2,), lambda_: Lambda = 1.0
) -> Tensor:
    """The base plus `lambda` times the TIES merge of the task matrices in the basis of their common singular vectors.

    The task matrices side by side are `U S [V_1 ... V_N]`; TIES (trim, elect, weighted mean of those that agree) goes over the
    coordinates `S V_i`, and U leads back. Trimmed tensor by tensor, as `ties` (the released code ranks the coordinates of all layers
    together); `int(density * size)` stay, one at least, and all that tie with the least. Directions with a singular value of zero are
    left out (there those below 1e-5). What is no matrix is merged by TIES as it is; the paper merges adapters, which have nothing
    else. Embeddings and heads are matrices like others; a tensor of three dimensions is a stack of them. Whole tensors are held in
    memory. Source: KnOTS-TIES of arXiv 2410.19735 as in its released code (gstoica27/KnOTS), whose 20 % is the default.
    """
    vectors = list(task_vectors(base, models))

    def aligned(matrices: Sequence[Tensor]) -> Tensor:
        u, s, v = parts(torch.cat(list(matrices), 1))
        return u @ elected((s[:, None] * v).tensor_split(len(matrices), 1))

    def elected(tasks: Sequence[Tensor]) -> Tensor:
        return sign_consensus([_trimmed(task, share) for task, share in zip(tasks, density, strict=True)], weight, normalize=True)

    merged = by_matrix(vectors, aligned, otherwise=elected)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


def _trimmed(task: Tensor, density: float) -> Tensor:
    """The largest elements of a task's coordinates, zeros for the others, as a new tensor."""
    if density == 1 or not task.numel():
        return task.clone()
    magnitude = task.abs()
    count = max(1, int(density * task.numel()))
    return task * (magnitude >= magnitude.flatten().kthvalue(task.numel() - count + 1).values)
