"""A matrix as codes and scales: what a few bits hold of rows of numbers, and the straight-through form of it that training sees.

    w ~ level[code] * scale (+ mean, for k-median)

A row is one rank component of a LoRA factor (a row of A, a column of B), or an output row of a weight. What shares a scale is the whole matrix, a row, or
128 elements of a row. "k-median" normalises by mean and standard deviation, as the 1-bit adapters of arXiv 2307.16867; "l2" by the root mean
square, and then takes the scale of least squares for the codes: at one bit the mean of |w|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_plus.errors import OptionError

from . import codebooks
from .codebooks import BITS, WIDTHS, Codebook

Scale = Literal["tensor", "component", "group"]
GROUP = 128  # elements of a row that share a scale, where groups do


@dataclass(frozen=True, slots=True)
class Coding:
    """How a matrix becomes codes; `bits` are those of all rows, or of each. Errors: OptionError for a width, a codebook or a scale that is not known."""

    bits: int | tuple[int, ...] = 1
    codebook: Codebook = "l2"
    scale: Scale = "component"

    def __post_init__(self) -> None:
        mixed = isinstance(self.bits, tuple)
        widths = self.bits if isinstance(self.bits, tuple) else (self.bits,)
        if wrong := [bits for bits in widths if bits not in (WIDTHS if mixed else BITS) or type(bits) is not int]:
            raise OptionError(f"bits={wrong[0]!r}: an adapter's codes have {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits")
        for name, value, known in (("codebook", self.codebook, get_args(Codebook)), ("scale", self.scale, get_args(Scale))):
            if value not in known:
                raise OptionError(f"{name}={value!r}: one of {', '.join(known)}")

    @property
    def columns(self) -> int:
        """Numbers that are stored for each scale: the scale, after the mean where there is one."""
        return 2 if self.codebook == "k-median" else 1

    def scales(self, rows: int, width: int) -> int:
        """How many scales a matrix has."""
        return 1 if self.scale == "tensor" else rows * (1 if self.scale == "component" else -(-width // GROUP))

    def shared(self, values: Tensor) -> Tensor:
        """The elements [rows, width] of each scale, [scales, elements]; groups that the width does not fill are filled with zeros."""
        if self.scale == "tensor":
            return values.reshape(1, -1)
        return values if self.scale == "component" else pad(values, (0, -values.shape[1] % GROUP)).view(-1, GROUP)

    def spread(self, scales: Tensor, rows: int, width: int) -> Tensor:
        """A number for each scale, [scales], as it multiplies elements: [rows, width], or what broadcasts to it."""
        if self.scale != "group":
            return scales[:, None]
        return scales.view(rows, -1, 1).expand(-1, -1, GROUP).flatten(1)[:, :width]

    def owners(self, rows: int, width: int) -> Tensor:
        """The number of the scale of each element, int64 [rows, width]."""
        row, column = torch.arange(rows)[:, None], torch.arange(width)[None, :]
        if self.scale == "group":
            return row * -(-width // GROUP) + column // GROUP
        return (row if self.scale == "component" else row * 0) + column * 0

    def widths(self, rows: int) -> tuple[int, ...]:
        """The bits of each row."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits,) * rows

    def row(self, number: int) -> Coding:
        """The coding of one row."""
        return replace(self, bits=self.bits[number] or (0,)) if isinstance(self.bits, tuple) else self

    def __str__(self) -> str:
        bits = "mixed bits" if isinstance(self.bits, tuple) else f"{self.bits} bit{'s' * (self.bits > 1)}"
        return f"{bits}, {self.codebook}, a scale for each {self.scale}"


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes uint8 [rows, width], and stats float32 [scales, columns]: (scale), or (mean, scale)."""

    codes: Tensor
    stats: Tensor
    coding: Coding


@cache
def table(codebook: Codebook, bits: int) -> Tensor:
    """The levels as they are stored, float32 [2^bits]."""
    return torch.tensor(codebooks.levels(codebook, bits), dtype=torch.float64).float()


@cache
def _boundaries(codebook: Codebook, bits: int) -> Tensor:
    return torch.tensor(codebooks.boundaries(codebooks.levels(codebook, bits)), dtype=torch.float64)


def nearest(normal: Tensor, coding: Coding) -> Tensor:
    """The codes of the nearest levels, uint8; on a boundary the lower one."""
    normal = normal.detach().double().contiguous()
    if not isinstance(coding.bits, tuple):
        return torch.bucketize(normal, _boundaries(coding.codebook, coding.bits)).to(torch.uint8)
    codes = torch.empty(normal.shape, dtype=torch.uint8)
    for bits, rows in _rows_of_width(coding.bits).items():
        codes[rows] = torch.bucketize(normal[rows], _boundaries(coding.codebook, bits)).to(torch.uint8)
    return codes


def levels_of(codes: Tensor, coding: Coding) -> Tensor:
    """The levels that codes stand for, float32."""
    if not isinstance(coding.bits, tuple):
        return table(coding.codebook, coding.bits)[codes.long()]
    values = torch.empty(codes.shape)
    for bits, rows in _rows_of_width(coding.bits).items():
        values[rows] = table(coding.codebook, bits)[codes[rows].long()]
    return values


def _rows_of_width(bits: tuple[int, ...]) -> dict[int, list[int]]:
    return {width: [row for row, own in enumerate(bits) if own == width] for width in dict.fromkeys(bits)}


def encode(matrix: Tensor, coding: Coding) -> Coded:
    """The codes of a float matrix [rows, width], in float64; a scale whose elements are all equal (all zero) gets scale 0, so that they come back exactly."""
    work = matrix.detach().double()
    mean, spread = _moments(work, coding)
    codes = nearest(_normal(work, mean, spread, coding), coding)
    if coding.codebook == "l2":
        spread = fitted(work, codes, coding)
    return Coded(codes, _stats(mean, spread, coding), coding)


def decode(coded: Coded, levels: Tensor | None = None) -> Tensor:
    """The matrix, float32 [rows, width]: a level times its scale, and then the mean added, two operations each rounded to float32.

    levels: those of a file, where it is not to be this version's codebook.
    """
    values = levels_of(coded.codes, coded.coding) if levels is None else levels[coded.codes.long()]
    values = values * coded.coding.spread(coded.stats[:, -1], *values.shape)
    return values + coded.coding.spread(coded.stats[:, 0], *values.shape) if coded.coding.columns == 2 else values


def straight_through(matrix: Tensor, coding: Coding) -> Tensor:
    """What `decode(encode(matrix))` is, as a function that has a gradient: rounding to levels counts as the identity, mean and scale as what they are.

    For k-median the gradient is `r (G - mean G) + mean G + <G, q - r n> / (N - 1) * n` over each scale's N elements, n being the normalised ones and q
    their levels (r = 1: no epsilon is added to the scale).
    """
    mean, spread = _moments(matrix, coding)
    normal = _normal(matrix, mean, spread, coding)
    codes = nearest(normal, coding)
    levels = levels_of(codes, coding).to(matrix.dtype)
    through = levels + normal - normal.detach()
    if coding.codebook == "l2":
        return through * coding.spread(fitted(matrix, codes, coding), *matrix.shape)
    return through * coding.spread(spread, *matrix.shape) + coding.spread(mean, *matrix.shape)


def fitted(matrix: Tensor, codes: Tensor, coding: Coding) -> Tensor:
    """The scales of least squares for these codes, [scales]: `<w, q> / <q, q>`."""
    levels = levels_of(codes, coding).to(matrix.dtype)
    size = coding.shared(levels * levels).sum(1)
    return coding.shared(matrix * levels).sum(1) / positive(size)


def rescaled(coded: Coded, factors: Tensor) -> Coded:
    """The same codes with every scale, and its mean, times a factor [scales]."""
    return replace(coded, stats=(coded.stats.double() * factors[:, None]).float())


def positive(values: Tensor) -> Tensor:
    """Values by which can be divided: 1 where they are not positive."""
    return torch.where(values > 0, values, torch.ones_like(values))


def _moments(matrix: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of n - 1) of what shares a scale; for l2 zero and the root mean square."""
    counts = coding.shared(torch.ones_like(matrix)).sum(1)
    if coding.codebook == "l2":
        return torch.zeros_like(counts), _root(coding.shared(matrix * matrix).sum(1) / counts)
    mean = coding.shared(matrix).sum(1) / counts
    centred = matrix - coding.spread(mean, *matrix.shape)
    return mean, _root(coding.shared(centred * centred).sum(1) / (counts - 1).clamp(min=1))


def _root(squares: Tensor) -> Tensor:
    """The square root, whose gradient is 0 where it is."""
    return torch.where(squares > 0, positive(squares).sqrt(), torch.zeros_like(squares))


def _normal(matrix: Tensor, mean: Tensor, spread: Tensor, coding: Coding) -> Tensor:
    size = coding.spread(positive(spread), *matrix.shape)
    return matrix / size if coding.codebook == "l2" else (matrix - coding.spread(mean, *matrix.shape)) / size


def _stats(mean: Tensor, spread: Tensor, coding: Coding) -> Tensor:
    return (torch.stack([mean, spread], 1) if coding.columns == 2 else spread[:, None]).float()
