"""Packed weights of random codes with the exact weight beside them, in float64 and out of the integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.bits import pack

ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of an output, to nearest, with one to spare
SUM = 2e-6  # sixteen roundings of float32, of the sum of magnitudes: far below the bound K * 2^-24 of one float32 sum
SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@dataclass(frozen=True)
class Toy:
    """A weight [rows, width] as it is stored, and what it is."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    exact: Tensor  # float64
    magnitude: Tensor  # float64; (|code| + |zero point|) * |scale|

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """What packed_linear takes after x."""
        return self.packed, self.scale, self.zero_point, self.bits, self.group_size


def a_toy(rows: int, width: int, bits: int = 4, group_size: int = 128, symmetric: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """A packed weight of random codes, scales of both signs, and zero points over the whole range."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = -(-width // group_size) if group_size else 1

    def draw(*shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(torch.int8)

    codes, zeros = draw(rows, width), draw(rows, groups)
    scale = (torch.randn(rows, groups, generator=generator) / 8).to(dtype)
    group = torch.arange(width) // (group_size or max(1, width))
    spread = scale.double()[:, group]
    less = torch.zeros(rows, width) if symmetric else zeros[:, group]
    return Toy(
        pack(codes, bits), scale, None if symmetric else pack(zeros.T.contiguous(), bits).T.contiguous(), bits, group_size,
        (codes.double() - less.double()) * spread, (codes.double().abs() + less.double().abs()) * spread.abs(),
    )  # fmt: skip


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agrees(y: Tensor, x: Tensor, toy: Toy, more: float = 0.0) -> bool:
    """Whether y is x W^T but for one rounding to its dtype and those of a float32 sum; `more` is what weights may be rounded by."""
    exact, size = x.double() @ toy.exact.T, x.double().abs() @ toy.magnitude.T
    least = 2.0**-24 if y.dtype == torch.float16 else 0.0  # half of the smallest number
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= ROUNDING[y.dtype] * exact.abs() + (SUM + more) * size + least).all())
