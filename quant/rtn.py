"""Round to nearest: every weight goes to the closest of 2^bits evenly spaced values that its group of inputs shares.

What is chosen is the spacing. Plain min-max lets the extreme of a group end on the outermost code, which is exact for the
extreme and coarse for all others. `clip` also tries smaller (and, where codes are many, slightly larger) ranges and keeps
the one whose squared error over the group is least.

Symmetric scales are signed: the extreme, positive or negative, goes to the code -2^(bits-1), which has no counterpart above. That
is a power of two, so the extreme is kept exactly, and the error is 13 % lower than with `max|w| / (2^bits - 1) * 2` at 4 bits in
groups of 128, 23 % at 3 bits and 40 % at 2 (specs/quant_formats_and_peers.md 2.2 has the convention of llm-compressor).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .quantized import Quantized, Scheme
from .quantizer import quantizer

BLOCK = 1 << 20  # elements worked on at a time; threads that work on fewer queue for Python's lock (2.5 times slower with two of them)

# By bits: the spacing that is best for a normal distribution of unit variance (J. Max, Quantizing for Minimum Distortion, 1960,
# table II), and where the search begins (at most) and ends, as parts of the whole range (measured; see tests/quant/test_rtn.py).
NORMAL = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
SEARCH = {2: (0.6, 1.0), 3: (0.75, 1.0), 4: (0.85, 1.025), 5: (0.92, 1.05), 6: (0.95, 1.075), 7: (0.97, 1.075), 8: (0.98, 1.075)}

Clip = Annotated[
    int,
    Field(ge=0, le=64, description="ranges tried for each group besides the whole one, for the least squared error; 0: none"),
]


@quantizer("rtn")
def rtn(weight: Tensor, scheme: Scheme, *, clip: Clip = 6) -> Quantized:
    """Round each weight to the nearest code of its group.

    weight: [rows, in], bfloat16, float16, float32 or float64, of a shape that the scheme fits. The scales have its dtype, and the
    codes are those of the scales as stored, computed in float32 and rounded once, half to even. Finite weights give finite
    scales and values; a group of zeros gives zeros.
    """
    rows, width = weight.shape
    groups = scheme.groups(width)
    codes = torch.empty((rows, width), dtype=torch.int8, device=weight.device)
    scale = torch.empty((rows, groups), dtype=weight.dtype, device=weight.device)
    zero_point = None if scheme.symmetric else torch.empty((rows, groups), dtype=torch.int8, device=weight.device)
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        zeros = None if zero_point is None else zero_point[block]
        _quantize_block(weight[block], scheme, clip, codes[block], scale[block], zeros)
    return Quantized(codes, scale, zero_point, scheme.bits)


def _quantize_block(
    weight: Tensor, scheme: Scheme, clip: int, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> None:
    """Quantise these rows into `codes`, `scale` and `zero_point`."""
    x = weight.to(torch.float32).reshape(*scale.shape, -1)  # [rows, groups, group]
    largest = torch.amax(x, -1, keepdim=True)  # [rows, groups, 1], as are all below that have no group
    smallest = torch.amin(x, -1, keepdim=True)
    if zero_point is None:
        whole = torch.where(largest > -smallest, largest, smallest) / scheme.low
    else:
        largest, smallest = largest.clamp_min_(0), smallest.clamp_max_(0)
        steps = scheme.high - scheme.low
        whole = largest / steps - smallest / steps  # each divided first: their difference may not be finite
    stored = _storable(whole, scheme, weight.dtype)
    zero = None if zero_point is None else _zero(smallest, stored, 1.0, scheme)
    if clip:
        stored, zero = _search(x, whole, smallest, stored, zero, scheme, clip, weight.dtype)
    code = torch.div(x, stored).round_()
    if zero is not None and zero_point is not None:
        code += zero
        zero_point.copy_(zero.squeeze(-1))
    codes.copy_(code.clamp_(scheme.low, scheme.high).flatten(-2))
    scale.copy_(stored.squeeze(-1))


def _search(
    x: Tensor, whole: Tensor, smallest: Tensor, stored: Tensor, zero: Tensor | None, scheme: Scheme, clip: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of least squared error among the whole range and `clip` others.

    The others are evenly spaced. They begin at the range that is best for a normal distribution of the group's power, so that
    the search reaches far enough where one outlier stretches a long group, and never later than `SEARCH` says.
    """
    first, last = SEARCH[scheme.bits]
    power = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * (NORMAL[scheme.bits] / math.sqrt(x.shape[-1]))
    begin = (power / whole.abs()).nan_to_num_(first).clamp_max_(first)  # 0/0 in a group of zeros
    buffers = torch.empty_like(x), torch.empty_like(x)
    least = _error(x, stored, zero, scheme, buffers)
    for trial in range(clip):
        factor = begin + (last - begin) * (trial / max(1, clip - 1))
        candidate = _storable(whole * factor, scheme, dtype)
        candidate_zero = None if zero is None else _zero(smallest, candidate, factor, scheme)
        error = _error(x, candidate, candidate_zero, scheme, buffers)
        better = error < least
        least = torch.where(better, error, least)
        stored = torch.where(better, candidate, stored)
        if zero is not None and candidate_zero is not None:
            zero = torch.where(better, candidate_zero, zero)
    return stored, zero


def _error(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, buffers: tuple[Tensor, Tensor]) -> Tensor:
    """The root of the squared error of each group; `buffers` are two tensors like x to work in."""
    steps, code = buffers
    torch.div(x, scale, out=steps)
    if zero is None:
        torch.clamp(steps, scheme.low, scheme.high, out=code).round_()
    else:
        torch.round(steps, out=code)
        torch.maximum(code, scheme.low - zero, out=code)
        torch.minimum(code, scheme.high - zero, out=code)
    steps -= code
    root: Tensor = torch.linalg.vector_norm(steps, dim=-1, keepdim=True)
    return root * scale.abs()


def _storable(scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The scale as `dtype` holds it, in float32: never zero, and small enough for every code to have a finite value."""
    limits = torch.finfo(dtype if dtype.itemsize < 4 else torch.float32)
    least = 2.0**-24 if dtype == torch.float16 else limits.tiny  # float16 scales are often subnormal: step 2^-24
    bound = limits.max / -scheme.low if scheme.symmetric else limits.max / (scheme.high - scheme.low + 1)
    size = scale.abs().clamp_(least, bound).to(dtype).to(torch.float32)
    return torch.where(scale < 0, -size, size)


def _zero(smallest: Tensor, scale: Tensor, factor: Tensor | float, scheme: Scheme) -> Tensor:
    """The code of zero where `smallest * factor` has the least code; float32 of integers."""
    return torch.sub(scheme.low, smallest / scale * factor).round_().clamp_(scheme.low, scheme.high)
