"""The product `B A` of low-rank factors, a run of rows at a time and the same to the bit however the rows are cut."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 1 << 17  # elements of a product that are computed at once


def block_rows(width: int) -> int:
    """Rows of `width` elements in a block: a power of two, so that steps cut by it go well with others."""
    return 1 << max(0, (BLOCK // max(1, width)).bit_length() - 1)


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Runs of rows that are computed at once.

    How a matrix product is summed depends on its shape, so that a block must be the same whatever run of rows it is asked for with:
    steps that multiply are cut at multiples of `block_rows`.
    """
    size = block_rows(width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
