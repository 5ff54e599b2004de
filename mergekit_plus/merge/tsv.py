"""TSV-Merge: the leading singular vectors of all tasks side by side, made orthogonal so that they do not interfere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .method import Lambda, merge_method, task_vectors
from .spectral import by_matrix, orthogonal, parts


@merge_method("tsv", unit="tensor")
def tsv(base: Tensor, models: Sequence[Tensor], *, lambda_: Lambda = 1.0) -> Tensor:
    """The base plus `lambda` times the leading singular parts of every task matrix, with their singular vectors made orthogonal to each other.

    Of each of N task matrices the `min(m, n) // N` leading parts `U_i S_i V_i` are set side by side, and U and V are replaced by the nearest
    matrices with orthonormal columns: `U' S V'`. Biases, norms and other tensors that are no matrices are averaged, and so are matrices
    with a side below N, of which the released code keeps nothing. Embeddings and heads are matrices like others; a tensor of three
    dimensions is a stack of them. Parts with a singular value of zero are left out, where the released code orthogonalizes against
    arbitrary vectors. Whole tensors are held in memory. Source: TSV-Merge of arXiv 2412.00081, algorithm 1, and its released code
    (AntoAndGar/task_singular_vectors).
    """
    vectors = list(task_vectors(base, models))
    merged = by_matrix(vectors, _side_by_side, least=len(vectors))
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


def _side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    most = min(matrices[0].shape) // len(matrices)
    left, values, right = zip(*(parts(matrix, most) for matrix in matrices), strict=True)
    return orthogonal(torch.cat(left, 1)) * torch.cat(values) @ orthogonal(torch.cat(right).T).T
