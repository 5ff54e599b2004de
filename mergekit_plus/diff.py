"""What differs between two checkpoints, tensor by tensor, streamed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Scan, Step
from .checkpoint.dtypes import TORCH_DTYPES
from .checkpoint.plan import row_multiple
from .checkpoint.spec import TensorSpec, natural_order


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both have in the same shape."""

    name: str
    changed: float  # share of the elements that differ
    max_abs: float  # largest |a - b|
    relative: float  # ||a - b|| / ||a||, in the 2-norm


@dataclass(frozen=True)
class Difference:
    """Two checkpoints beside each other."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unlike: tuple[str, ...]  # same name, other shape or dtype; those of equal shape are compared all the same
    tensors: tuple[TensorDifference, ...]

    @property
    def same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.only_a or self.only_b or self.unlike or any(tensor.changed for tensor in self.tensors))


def diff(a: Checkpoint, b: Checkpoint) -> Difference:
    """Compare two checkpoints; memory stays at a few slabs."""
    both = sorted((name for name in a.specs if name in b.specs), key=natural_order)
    unlike = [name for name in both if a.specs[name] != b.specs[name]]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        comparable = [name for name in both if _comparable(a.specs[name], b.specs[name])]
        tensors = tuple(pool.map(lambda name: _compare(a, b, name), comparable))
    only_a = tuple(name for name in a.specs if name not in b.specs)
    only_b = tuple(name for name in b.specs if name not in a.specs)
    return Difference(only_a, only_b, tuple(unlike), tensors)


def _comparable(a: TensorSpec, b: TensorSpec) -> bool:
    """Element by element: of one shape, and of dtypes that torch holds; others are compared as bytes, if of one dtype."""
    return a.shape == b.shape and (a.dtype == b.dtype or (a.dtype in TORCH_DTYPES and b.dtype in TORCH_DTYPES))


def _compare(a: Checkpoint, b: Checkpoint, name: str) -> TensorDifference:
    step = Step(((a, name), (b, name)), (a.specs[name],), lambda tensors, first_row, measured: tensors, row_multiple(a.specs[name]))
    parts = Scan([step]).map(_measure)
    changed, max_abs = sum(part[0] for part in parts), max(part[1] for part in parts)
    squares, scale = sum(part[2] for part in parts), sum(part[3] for part in parts)
    relative = sqrt(squares / scale) if scale else float(squares > 0)
    return TensorDifference(name, changed / max(1, a.specs[name].numel), max_abs, relative)


def _measure(tensors: Sequence[Tensor]) -> tuple[int, float, float, float]:
    """Elements that differ, largest difference, and the squares of the difference and of the first tensor."""
    whole = all(not tensor.is_floating_point() and not tensor.is_complex() for tensor in tensors)
    equal = tensors[0] == tensors[1] if whole and tensors[0].dtype == tensors[1].dtype else None  # float64 holds integers to 2^53
    x, y = (tensor.to(torch.float64) if not tensor.is_complex() else torch.view_as_real(tensor).double() for tensor in tensors)
    same = (x == y) | (x.isnan() & y.isnan()) if equal is None else equal
    inf = float("inf")
    delta = (x - y).abs().nan_to_num(nan=inf, posinf=inf).masked_fill(same, 0)
    largest = float(delta.max()) if x.numel() else 0.0
    return int((~same).sum()), largest, float(delta.square().sum()), float(x.nan_to_num(nan=0, posinf=0, neginf=0).square().sum())
