"""The best approximation of a matrix by one of low rank: its leading singular triples, exact for small matrices, else by random projection.

The randomised SVD (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) draws its directions from a generator that is seeded by the
tensor's name, so that the same inputs give the same factors.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

EXACT = 384  # the shorter side of a matrix whose SVD is computed in full
OVERSAMPLE = 16  # directions beyond the rank
ITERATIONS = 4  # of the power method: the spectra of fine-tunes fall slowly


def leading(matrix: Tensor, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triples of a float matrix [m, n]: U [m, count], S [count], V [n, count], all of them where there are fewer.

    S holds what the directions found carry: the squares of S sum to at most those of the matrix, and what `U S V^T` leaves is the difference.
    """
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= EXACT or 2 * (count + OVERSAMPLE) >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vt[:count].T
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    directions = torch.randn((matrix.shape[1], count + OVERSAMPLE), generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :count], s[:count], vt[:count].T


def factors(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, n] and B [m, rank] with `B A = U S V^T`, the singular values shared out equally so that neither loses more in a short dtype."""
    root = s.sqrt()
    return (v * root).T.contiguous(), u * root


def rank_of_product(bs: list[Tensor], as_: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the best rank for the sum of the products `B_i A_i`, from QR factors: the sum itself is never formed. In float64."""
    b, a = torch.cat([b.double() for b in bs], 1), torch.cat([a.double() for a in as_], 0)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return factors(q_b @ u[:, :rank], s[:rank], q_a @ vt[:rank].T)


def rank_for(matrix: Tensor, share: float, name: str) -> tuple[int, int]:
    """The least rank whose approximation keeps this share of the squared Frobenius norm, and how many triples must be asked for to get it.

    An exact norm on one side and what the directions really carry on the other, so that the share is kept however good they are.
    """
    total = float(matrix.double().square().sum())
    count = 32
    while True:
        s = leading(matrix, count, name)[1]
        kept = s.double().square().cumsum(0)
        enough = int((kept < share * total * (1 - 1e-6)).sum()) + 1  # float32 keeps the whole to so much
        if enough <= len(s) or len(s) == min(matrix.shape):
            return min(enough, len(s)), count
        count *= 2
