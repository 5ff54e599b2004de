"""The best approximation of low rank where inputs weigh the error: the X of a rank with the least sum of |(D - X) x|^2 over the inputs x of a text.

With H the mean of x x^T and H = R R^T, that sum is ||(D - X) R||^2, whatever root R is: X = U S V^T R^-1, of the leading singular triples of D R. Of
CorDA (arXiv 2406.05223), which takes the SVD of D H in place of D R, and so weighs by the square of the inputs' power.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lowrank import leading

DAMP = 0.01  # of the mean power of the inputs, added to that of each: a text says little of the directions that it hardly has


def damped(gram: Tensor, damp: float = DAMP) -> Tensor:
    """H + damp * mean(diag H) * I, in float64; I where H is zero: of inputs that no token reached."""
    mean = float(gram.diagonal().mean())
    return gram.double() + torch.eye(len(gram), dtype=torch.float64) * (damp * mean if mean > 0 else 1.0)


def leading_for(matrix: Tensor, gram: Tensor, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, count], S [count] and V [n, count] of the best `U S V^T` for a matrix [m, n] whose inputs have the Gram matrix [n, n], the triples that matter
    most first; columns of U and V have length 1, those of V are not orthogonal. In float64.
    """
    root = torch.linalg.cholesky(damped(gram))
    u, s, v = leading(matrix.double() @ root, count, name)
    v = torch.linalg.solve_triangular(root.T, v, upper=True)
    lengths = torch.linalg.vector_norm(v, dim=0)
    return u, s * lengths, v / lengths
