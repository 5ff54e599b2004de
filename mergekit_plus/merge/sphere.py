"""Vectors as points of a sphere: the angles between them, from one pass, and the weights of what lies between them.

Everything in the span of some vectors is known by their inner products: a merge on the sphere is a weighted sum whose weights come out of an
N x N matrix, in float64, however large the vectors are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..statistics import Scan, sums

Matrix = NDArray[np.float64]


def gram(scan: Scan, vectors: Callable[[Tensor | None, Sequence[Tensor]], Sequence[Tensor]]) -> Matrix:
    """The inner products of flat vectors, [N, N] in float64. One pass."""

    def products(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
        rows = [vector.to(torch.float64).reshape(-1) for vector in vectors(base, models)]
        return [float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i + 1)]

    lower = sums(scan, products)
    count = (math.isqrt(8 * len(lower) + 1) - 1) // 2
    found = np.zeros((count, count))
    found[np.tril_indices(count)] = lower
    return found + np.tril(found, -1).T


def cosines(products: Matrix) -> Matrix:
    """The cosines of the angles between vectors with these inner products; 0 where one of the two is zero."""
    norms = np.sqrt(np.diag(products))
    scale = np.outer(norms, norms)
    found: Matrix = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return found.clip(-1, 1)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the rows (along the last dimension) in float64, [..., 1]; what is not finite counts as zero."""
    return (finite(a) * finite(b)).sum(-1, keepdim=True)


def column_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products along the first dimension in float64, without that dimension; what is not finite counts as zero."""
    return (finite(a) * finite(b)).sum(0)


def finite(tensor: Tensor) -> Tensor:
    """In float64, with zeros for NaN and infinities."""
    return tensor.to(torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).contiguous()


def cosine(both: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The cosine from `a.b`, `a.a` and `b.b` in float64; 0 where a vector is zero."""
    scale = first.sqrt() * second.sqrt()
    return (both / scale.where(scale > 0, 1)).clamp_(-1, 1)


def arc(cosine: Tensor, t: float, parallel: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a and b at `t` on the great circle from a to b, `sin((1-t)W) / sin W` and `sin(tW) / sin W` with the angle W.

    Where `parallel`, at which the circle's formula loses its digits or its way, those of the straight line.
    """
    angle = torch.acos(torch.where(parallel, 0.0, cosine))
    stay, go = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    return torch.where(parallel, 1 - t, stay), torch.where(parallel, t, go)


def barycentre(products: Matrix, weights: Sequence[float], eps: float) -> list[float]:
    """How much of each vector goes into the point of the sphere above their weighted mean direction, at their weighted mean length."""
    norms = np.sqrt(np.diag(products))
    share = np.array(weights) / (norms + eps)
    length = math.sqrt(max(0.0, float(share @ products @ share)))
    if length < eps:
        return list(weights)
    return [float(value) for value in share / length * float(norms @ np.array(weights))]


def karcher_mean(products: Matrix, most: int, tol: float) -> list[float]:
    """How much of each vector goes into their Karcher mean: the point of the sphere with the least mean squared angle to them."""
    norms, cosine = np.sqrt(np.diag(products)), cosines(products)
    count = len(norms)
    valid = norms > tol
    if not valid.any():
        return [0.0] * count
    alpha = valid / valid.sum()
    mean = alpha.copy()  # in terms of the unit vectors
    length = math.sqrt(max(0.0, float(mean @ cosine @ mean)))
    mean = mean / length if length >= tol else np.eye(count)[int(np.argmax(valid))]
    for _ in range(most):
        dots = np.clip(cosine @ mean, -1, 1)
        angles = np.arccos(dots)
        # an antipode of the mean has no shortest way to it, and one that is the mean has none left
        near = valid & (angles >= tol) & (math.pi - angles >= tol)
        pull = np.divide(alpha * angles, np.sin(angles), out=np.zeros(count), where=near)
        tangent = pull - float(pull @ dots) * mean
        step = math.sqrt(max(0.0, float(tangent @ cosine @ tangent)))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= math.sqrt(float(mean @ cosine @ mean))
    units = np.divide(mean, norms, out=np.zeros(count), where=valid)
    return [float(value) for value in units * norms.mean()]
