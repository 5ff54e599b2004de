"""Matrices by their singular values: the leading parts, the nearest orthogonal matrix, and which tensors count as matrices.

What a singular value of zero goes with is arbitrary, and whatever is built on it is noise: `parts` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .combine import weighted_sum


def parts(matrix: Tensor, most: int | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` leading singular vectors and values of a matrix [m, n], as [m, k], [k] and [k, n]; fewer where the rest are zero.

    Zero is what rounding leaves of nothing at this scale, by default that of the largest singular value.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    zero = 4 * torch.finfo(s.dtype).eps * max(matrix.shape) ** 0.5 * (s[:1].sum() if scale is None else scale)
    count = int((s > zero).sum())
    count = count if most is None else min(most, count)
    return u[:, :count], s[:count], v[:count]


def orthogonal(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to this one, [m, k] (its polar factor; in its own span where columns repeat)."""
    u, _, v = parts(columns)
    return u @ v


def mean(vectors: Sequence[Tensor]) -> Tensor:
    return weighted_sum((vector.clone() for vector in vectors), [1.0] * len(vectors)).div_(len(vectors))


def by_matrix(
    vectors: Sequence[Tensor], merge: Callable[[Sequence[Tensor]], Tensor], least: int = 1, otherwise: Callable[[Sequence[Tensor]], Tensor] = mean
) -> Tensor:
    """`merge` of the matrices that some tensors are, `otherwise` of tensors that are none.

    A tensor of three dimensions is a stack of matrices (packed experts). One or none, or more than three, make no matrix, nor does one with
    a side below `least`. What is not finite counts as zero and is carried through.
    """
    shape = vectors[0].shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < least or not vectors[0].numel():
        return otherwise(vectors)
    stacks = [vector.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).contiguous().view(-1, *shape[-2:]) for vector in vectors]
    merged = torch.stack([merge(matrices) for matrices in zip(*stacks, strict=True)]).view(shape)
    for vector in vectors:
        merged.add_(vector - vector)
    return merged
