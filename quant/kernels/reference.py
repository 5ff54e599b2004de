"""The kernels in plain torch: any device, any shape, any width, differentiable; what every other path falls back to and is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..formats.bits import unpack


def dequantized(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, width] that stored tensors stand for, `(code - zero point) * scale` in float32, rounded once to `dtype`.

    packed: int32 [N, ceil(width*bits/32)]. scale: [N, ceil(width/group_size)]. zero_point: int32 [ceil(N*bits/32), groups] or None.
    """
    rows = scale.shape[0]
    if not rows * width:
        return torch.zeros((rows, width), dtype=dtype, device=packed.device)
    codes = unpack(packed, bits, width).float()  # signed
    group = torch.arange(width, device=packed.device) // (group_size or max(1, width))
    if zero_point is not None:
        zeros = unpack(zero_point.T.clone(memory_format=torch.contiguous_format), bits, rows).T.float()  # [N, groups], signed like the codes
        codes = codes - zeros[:, group]
    return (codes * scale.float()[:, group]).to(dtype)


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """`x W^T` [..., N] in x's dtype, worked out in float32 (float64 for a float64 x) and rounded once."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantized(packed, scale, zero_point, bits, group_size, x.shape[-1], work)
    return functional.linear(x.to(work), weight).to(x.dtype)


def signs_of(signs: Tensor, width: int) -> Tensor:
    """uint8 [rows, ceil(width/8)] to float32 [rows, width] of +1 and -1."""
    places = torch.arange(width, device=signs.device)
    return ((signs[:, places // 8] >> (places % 8).to(torch.uint8)) & 1).float() * 2 - 1


def signs_linear(x: Tensor, signs: Tensor, width: int, transposed: bool) -> Tensor:
    """`x S^T`, or `x S` where transposed, float32."""
    values = signs_of(signs, width)
    return functional.linear(x.float(), values.T if transposed else values)


def signs_linear_batched(x: Tensor, signs: Tensor, owner: Tensor, width: int, transposed: bool) -> Tensor:
    """`signs_linear` with the signs [adapters, rows, bytes] of each row's owner; zeros where the owner is none of them."""
    out = x.new_zeros((*x.shape[:-1], width if transposed else signs.shape[1]), dtype=torch.float32)
    for number, own in enumerate(signs):
        rows = owner == number
        out[rows] = signs_linear(x[rows], own, width, transposed)
    return out
