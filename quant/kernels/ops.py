"""The kernels as operators of torch: schemas, what they return for torch.compile, and the reference as the implementation of last resort.

A device's implementation (cpu.py, cuda.py) registers itself under that device's key. None has a derivative: __init__.py takes the reference where one
is wanted, so that the operators cost as little as they can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

LIBRARY: Any = torch.library.Library("mergekit_plus", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, int bits, int group_size) -> Tensor")
LIBRARY.define("signs_linear(Tensor x, Tensor signs, int width, bool transposed) -> Tensor")
LIBRARY.define("signs_linear_batched(Tensor x, Tensor signs, Tensor owner, int width, bool transposed) -> Tensor")
packed_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int], Tensor] = torch.ops.mergekit_plus.packed_linear.default
signs_linear: Callable[[Tensor, Tensor, int, bool], Tensor] = torch.ops.mergekit_plus.signs_linear.default
signs_linear_batched: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor] = torch.ops.mergekit_plus.signs_linear_batched.default


def _packed_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _signs_linear(x: Tensor, signs: Tensor, width: int, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], width if transposed else signs.shape[0]), dtype=torch.float32)


def _signs_linear_batched(x: Tensor, signs: Tensor, owner: Tensor, width: int, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], width if transposed else signs.shape[1]), dtype=torch.float32)


for _name, _fake, _run in (
    ("packed_linear", _packed_linear, reference.packed_linear), ("signs_linear", _signs_linear, reference.signs_linear),
    ("signs_linear_batched", _signs_linear_batched, reference.signs_linear_batched),
):  # fmt: skip
    torch.library.register_fake(f"mergekit_plus::{_name}", _fake, lib=LIBRARY)
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
