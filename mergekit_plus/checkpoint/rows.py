"""Rows of a tensor in any order, from few positional reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import TORCH_DTYPES
from .spec import TensorSpec

GAP = 1 << 14  # bytes between two wanted rows that are read along rather than skipped


def pick_rows(read: Callable[[slice], Tensor], spec: TensorSpec, index: Tensor) -> Tensor:
    """The rows that `index` (int64) names, in its order; zeros for -1. Each run of neighbouring rows is one call of `read`."""
    wanted, back = torch.unique(index, return_inverse=True)  # sorted
    if torch.equal(wanted, index) and len(wanted) and wanted[0] >= 0 and wanted[-1] - wanted[0] == len(wanted) - 1:
        return read(slice(int(wanted[0]), int(wanted[-1]) + 1))
    begin = int(len(wanted) > 0 and wanted[0] < 0)  # the row of zeros stands first
    found = torch.zeros((len(wanted), *spec.shape[1:]), dtype=TORCH_DTYPES[spec.dtype])
    far = torch.diff(wanted[begin:]) > max(1, GAP // max(1, spec.row_bytes))
    cuts = [begin, *(torch.nonzero(far).flatten() + begin + 1).tolist(), len(wanted)]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        if start < stop:
            first = int(wanted[start])
            found[start:stop] = read(slice(first, int(wanted[stop - 1]) + 1))[wanted[start:stop] - first]
    return found[back]
