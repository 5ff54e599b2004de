"""Adapters that start from the weight's own components: CorDA (Yang et al., arXiv 2406.05223), and PiSSA (arXiv 2404.02948), which looks at no text.

    W C = U S V^T,  B0 = U_r S_r^1/2,  A0 = S_r^1/2 V_r^T C^-1,   y = (W - B0 A0 + B A) x

C is the mean of x x^T over the inputs x of a text. Instruction-previewed, the first r triples train, for the inputs of the task; knowledge-preserving,
the last r, which the inputs of what is to be kept hardly see. The base is never changed: beside it stands B A - B0 A0, whose rank is 2 r at most, and
which is written as the plain LoRA that it is. Differs from the released code: inputs are not divided by the absolute value of their largest element
(which is no bound on them, and nearly zero for some), and C is damped once, in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergekit_plus.adapters.lowrank import factors, leading, rank_of_product
from mergekit_plus.adapters.weighted import damped

from .latent import Latent, sizes_of

Init = Literal["lora", "pissa", "corda-ipm", "corda-kpm"]
RATES = {"pissa": 1e-2, "corda-ipm": 1e-2, "corda-kpm": 1e-1}  # learning rates by default, relative to the components: the last are small


def components(weight: Tensor, gram: Tensor | None, rank: int, init: Init, name: str) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and, by its columns, B0 [rank, out], float32, of a weight [out, in]; gram [in, in]: of its inputs, None for PiSSA."""
    if gram is None:
        a, b = factors(*leading(weight.double(), rank, name))
    else:
        c = damped(gram)
        weighed = weight.double() @ c
        if init == "corda-ipm":
            u, s, v = leading(weighed, rank, name)
        else:
            u, s, vt = torch.linalg.svd(weighed, full_matrices=False)
            u, s, v = u[:, -rank:], s[-rank:], vt[-rank:].T
        a, b = factors(u, s, torch.linalg.solve(c, v))
    return a.float(), b.T.float().contiguous()


class Shifted(Latent):
    """Latents that start from components of the weight, and add only what they have become since."""

    def __init__(self, a: Tensor, rows_b: Tensor) -> None:
        super().__init__(a, rows_b, 1.0, None, (_size(a), _size(rows_b)))
        self.start = tuple(rows.detach().clone() for rows in super().rows())

    def rows(self) -> tuple[Tensor, Tensor]:
        """B A - B0 A0 as one product, of twice the rank."""
        (a, rows_b), (a0, rows_b0) = super().rows(), self.start
        return torch.cat([a, a0]), torch.cat([rows_b, -rows_b0])

    def stored(self) -> tuple[Tensor, Tensor]:
        """The product by its own components: rounded as it was put together, it would be the small difference of large numbers."""
        a, rows_b = (rows.double() for rows in self.rows())
        a, b = rank_of_product([rows_b.T], [a], len(a))
        return a, b.T


def _size(rows: Tensor) -> Tensor:
    """One size for all components, [1, 1]: a step then moves them alike, whatever their singular values, as in the papers."""
    return sizes_of(rows.reshape(1, -1))
