"""Matrix products with weights as they are stored: packed integers, and adapters' signs.

    y = packed_linear(x, weight_packed, weight_scale, weight_zero_point, bits=4, group_size=128)

The tensors are those of formats/pack_quantized.py, read in place: no second copy, nothing to prepare. csrc/ holds the kernels; where none fits the
machine, the dtype or the shape, reference.py does the same in plain torch. docs/kernels.md says what runs where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_plus.errors import OptionError

from ..formats.bits import words
from . import cpu, cuda, ops, reference
from .library import available
from .order import grouped

__all__ = ["available", "cpu", "cuda", "grouped", "packed_linear", "reference", "signs_linear", "signs_linear_batched"]


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """`x W^T` in x's dtype for a packed weight W [N, K], `(code - zero point) * scale`.

    x: [..., K], a float. packed: int32 [N, ceil(K*bits/32)]. scale: [N, ceil(K/group_size)], a float. zero_point: int32 [ceil(N*bits/32), groups], packed
    down the rows, or None for symmetric codes. group_size: inputs of a scale, 0 for one a row. Derivatives exist by x and by scale.

    Errors: OptionError for tensors whose shapes do not fit each other.
    """
    _check(x, packed, scale, zero_point, bits, group_size)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return reference.packed_linear(x, packed, scale, zero_point, bits, group_size)
    return ops.packed_linear(x, packed, scale, zero_point, bits, group_size)


def signs_linear(x: Tensor, signs: Tensor, width: int, transposed: bool = False) -> Tensor:
    """`x S^T` for signs S [rows, width], or `x S` where transposed; float32, for what is scaled and added before it is rounded.

    x: [..., width], or [..., rows] where transposed; a float. signs: uint8 [rows, ceil(width/8)], LSB first, 1 for +1 and 0 for -1, as adapters/packing.py
    stores one bit an element. Derivatives exist by x.

    Errors: OptionError for tensors whose shapes do not fit each other.
    """
    inputs = signs.shape[0] if transposed else width
    if signs.dim() != 2 or signs.shape[1] != -(-width // 8) or x.shape[-1:] != (inputs,):
        raise OptionError(f"signs {list(signs.shape)} of width {width} do not fit inputs {list(x.shape)}: ceil(width/8) bytes a row, {inputs} numbers an input")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.signs_linear(x, signs, width, transposed)
    return ops.signs_linear(x, signs, width, transposed)


def signs_linear_batched(x: Tensor, signs: Tensor, owner: Tensor, width: int, transposed: bool = False) -> Tensor:
    """`signs_linear` for a batch whose rows have adapters of their own; on a GPU one launch, whatever their number.

    x: [..., width], or [..., rows] where transposed; a float. signs: uint8 [adapters, rows, ceil(width/8)]. owner: integers [...], the adapter of each row
    of x; where it is none of them, such as -1, the result is zero. Derivatives exist by x.

    Errors: OptionError for tensors whose shapes do not fit each other.
    """
    inputs = signs.shape[1] if transposed and signs.dim() == 3 else width
    if signs.dim() != 3 or signs.shape[2] != -(-width // 8) or x.shape[-1:] != (inputs,) or owner.shape != x.shape[:-1]:
        sizes = f"signs {list(signs.shape)} of width {width}, owners {list(owner.shape)}"
        raise OptionError(f"{sizes} do not fit inputs {list(x.shape)}: an owner for each input, ceil(width/8) bytes a row, {inputs} numbers an input")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.signs_linear_batched(x, signs, owner, width, transposed)
    return ops.signs_linear_batched(x, signs, owner, width, transposed)


def _check(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> None:
    """Shapes that kernels may believe."""
    if x.dim() < 1 or packed.dim() != 2 or scale.dim() != 2 or not 1 <= bits <= 8 or group_size < 0:
        raise OptionError(f"packed_linear takes x [..., K], packed [N, words], scale [N, groups] and 1 to 8 bits; bits={bits}, group_size={group_size}")
    width, rows = x.shape[-1], packed.shape[0]
    groups = -(-width // group_size) if group_size else 1
    expected = [(packed, (rows, words(width, bits))), (scale, (rows, groups))]
    if zero_point is not None:
        expected.append((zero_point, (words(rows, bits), groups)))
    for name, (tensor, shape) in zip(("packed", "scale", "zero_point"), expected, strict=False):
        if tuple(tensor.shape) != shape:
            raise OptionError(f"{name} is {list(tensor.shape)}, but {bits} bits of a weight {[rows, width]} in groups of {group_size} make it {list(shape)}")
    if packed.dtype != torch.int32 or (zero_point is not None and zero_point.dtype != torch.int32):
        raise OptionError("packed codes and zero points are int32 words")
