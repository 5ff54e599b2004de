"""What a tensor is before its bytes are read: a name, a dtype tag, a shape. No torch here, so that plans are cheap."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod

from ..errors import OptionError, nearest

# Bits of an element, in the order in which the safetensors library sorts tensors inside a file (last first).
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
DTYPE_RANK = {tag: rank for rank, tag in enumerate(DTYPE_BITS)}
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")  # what arithmetic is done on; everything else is carried


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor before its bytes are read; `dtype` is the safetensors tag: "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(1, self.rows)

    @property
    def is_float(self) -> bool:
        """Whether arithmetic can be done on it."""
        return self.dtype in FLOAT_DTYPES

    def slice_shape(self, rows: slice | None) -> tuple[int, ...]:
        """The shape of these rows; a scalar is one row and stays a scalar.

        Errors: ValueError for rows that the tensor does not have.
        """
        if rows is not None and not 0 <= rows.start <= rows.stop <= self.rows:
            raise ValueError(f"{self.name} has {self.rows} rows, not {rows.start} to {rows.stop}")
        return self.shape if rows is None or not self.shape else (rows.stop - rows.start, *self.shape[1:])


@lru_cache(maxsize=1 << 17)  # a plan sorts the same names several times
def natural_order(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """A sort key under which `layers.2` comes before `layers.10`; no two names share one."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)), name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of these shell patterns matches a tensor's name, or the end of it that follows a dot: `layers.3.*` is all of `model.layers.3`."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def check_patterns(option: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern that matches nothing.

    Errors: OptionError.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise OptionError(f"{option} '{pattern}' matches no tensor.{nearest(pattern, names) if len(names) < 1000 else ''}")
