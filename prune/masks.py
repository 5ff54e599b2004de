"""Masks: which weights are zero. How many, exactly; and, in a file, one bit a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from mergekit_plus.errors import OptionError


@dataclass(frozen=True, slots=True)
class Sparsity:
    """A share of zeros: among all that is compared with one another, or, with a `group`, in every `group` consecutive inputs of an output row.

    Errors: OptionError for a share outside [0, 1).
    """

    share: Fraction
    group: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise OptionError(f"sparsity {float(self.share):g}: a share of zeros from 0 to below 1, as in 0.5")

    @classmethod
    def of(cls, sparsity: float | None = None, pattern: str | None = None) -> Sparsity:
        """What a user asks for: a share, or a pattern "n:m", at most n weights that are not zero in every m.

        Errors: OptionError for neither and for both, and for what is no share and no pattern.
        """
        if (sparsity is None) == (pattern is None):
            raise OptionError("say how much goes, with a sparsity (0.5) or with a pattern (2:4); one of the two")
        if pattern is None:
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not abs(sparsity) < 2:
                raise OptionError(f"sparsity {sparsity!r}: a share of zeros from 0 to below 1, as in 0.5")
            return cls(Fraction(str(sparsity)))  # as it is written: 0.29 of 100 are 29
        numbers = re.fullmatch(r"(\d{1,4}):(\d{1,4})", str(pattern))
        if not numbers or not 0 < int(numbers[1]) <= int(numbers[2]):
            raise OptionError(f"pattern {pattern!r}: n:m for at most n weights that are not zero in every m, as in 2:4")
        kept, group = int(numbers[1]), int(numbers[2])
        return cls(Fraction(group - kept, group), group)

    def count(self, size: int) -> int:
        """Zeros among `size` weights."""
        return int(self.share * size)

    def fits(self, inputs: int) -> str | None:
        """Why rows of so many inputs cannot have this pattern; None where they can."""
        return f"has {inputs} inputs, which groups of {self.group} do not divide" if self.group and inputs % self.group else None

    def __str__(self) -> str:
        return f"{self.group - self.count(self.group)}:{self.group}" if self.group else f"{float(self.share):.4g}"


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` least along the last dimension; of equal ones the first. bool, in the shape of `scores`."""
    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def lowest_of_rows(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """True where `scores` [rows, inputs] are the least of their row, or of their group in it."""
    if not sparsity.group:
        return lowest(scores, sparsity.count(scores.shape[-1]))
    groups = scores.reshape(len(scores), -1, sparsity.group)  # [rows, groups, group]
    return lowest(groups, sparsity.count(sparsity.group)).flatten(-2)


def has_pattern(weight: Tensor, kept: int, group: int) -> bool:
    """Whether every `group` consecutive inputs of a row of the weight [rows, inputs] hold at most `kept` that are not zero."""
    return weight.shape[-1] % group == 0 and bool(((weight != 0).reshape(len(weight), -1, group).sum(-1) <= kept).all())


def pack(mask: Tensor) -> Tensor:
    """A mask [rows, inputs], bool, one bit a weight: uint8 [rows, ceil(inputs / 8)]; bit j of byte i is input 8 i + j, what is left over is 0."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpack(packed: Tensor, inputs: int) -> Tensor:
    """The mask [rows, inputs] of packed bits."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=inputs, bitorder="little")).bool()


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a packed mask of a weight of this shape."""
    return (*shape[:-1], -(-shape[-1] // 8))
