"""What every quantiser returns and every on-disk format stores: integer codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_plus.errors import OptionError

BITS = range(2, 9)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight `[out, in]` becomes integers: one scale for each `group_size` inputs of an output row, 0 for one a row.

    Errors: OptionError for a width or a group size that cannot be.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise OptionError(f"bits={self.bits!r}: a weight has {BITS[0]} to {BITS[-1]} bits")
        if type(self.group_size) is not int or self.group_size < 0:
            raise OptionError(f"group_size={self.group_size!r}: a number of inputs, such as 32, 64 or 128; 0 for one scale a row")
        if type(self.symmetric) is not bool:
            raise OptionError(f"symmetric={self.symmetric!r}: true or false")

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """Scales of a row of `width` inputs that the scheme fits."""
        return width // self.group_size if self.group_size else 1

    def fits(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have this scheme, or None where it can.

        compressed-tensors and the engines that read it know whole groups only.
        """
        if reason := no_matrix(shape):
            return reason
        if self.group_size and shape[1] % self.group_size:
            return f"has {shape[1]} inputs, which groups of {self.group_size} do not divide; give a group size that does, or 0"
        return None

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "one scale a row"
        return f"{self.bits} bits, {groups}, {'symmetric' if self.symmetric else 'asymmetric'}"


def no_matrix(shape: Sequence[int]) -> str | None:
    """Why a tensor of this shape cannot be quantised, whatever the scheme; None where it can."""
    if len(shape) != 2:
        return f"has {len(shape)} dimensions; only a matrix [out, in] is quantized"
    return f"is empty: {list(shape)}" if 0 in shape else None


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised weight: `weight ~ (codes - zero_point) * scale`.

    A scale may be negative: -8 is one step further from zero than 7, so the sign says which end of a group is the longer.
    """

    codes: Tensor  # int8 [out, in], signed: -2^(bits-1) .. 2^(bits-1)-1
    scale: Tensor  # [out, groups], in the dtype that is stored
    zero_point: Tensor | None  # int8 [out, groups], signed like the codes; None where symmetric
    bits: int
    note: str = ""  # what a user should know of how it was made, such as damping that had to be raised

    def rows(self, rows: slice) -> Quantized:
        """These of its rows, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return Quantized(self.codes[rows], self.scale[rows], zero_point, self.bits, self.note)


def dequantize(quantized: Quantized) -> Tensor:
    """`(codes - zero_point) * scale`, `[out, in]` in the scale's dtype; bit for bit what compressed-tensors decodes.

    The difference has at most 9 bits, so float32 holds it exactly, and for half-precision scales the product as well: one
    rounding is left, the last. (compressed-tensors 0.20, lifecycle/forward_helpers.py `_dequantize`, works in the scale's dtype.)
    """
    scale = quantized.scale
    work = torch.float64 if scale.dtype == torch.float64 else torch.float32
    values = quantized.codes.to(work).view(*scale.shape, -1)  # [out, groups, group]
    if quantized.zero_point is not None:
        values -= quantized.zero_point.to(work).unsqueeze(-1)
    values *= scale.to(work).unsqueeze(-1)
    return values.flatten(-2).to(scale.dtype)
