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
    x = weight.to(torch.float32).unflatten(-1, (scale.shape[-1], -1))  # [rows, groups, group]
    largest = torch.amax(x, -1, keepdim=True)  # [rows, groups, 1], as are all below that have no group
    smallest = torch.amin(x, -1, keepdim=True)
    if scheme.symmetric:
        spacing = torch.where(largest > -smallest, largest, smallest) / scheme.low
    else:
        largest, smallest = largest.clamp_min_(0), smallest.clamp_max_(0)
        codes_above = scheme.high - scheme.low
        spacing = largest / codes_above - smallest / codes_above  # each divided first: their difference may not be finite
    tiny = torch.finfo(torch.float32).tiny
    spacing = torch.where(spacing.abs() < tiny, tiny, spacing)  # groups of zeros, and of float32 subnormals
    bottom = None if scheme.symmetric else smallest / spacing
    if clip:
        factor, gain = _search(x / spacing, bottom, scheme, clip)
        stored = _storable(spacing * factor * gain, scheme, weight.dtype)
        steps = stored / gain
    else:
        factor = 1.0
        steps = stored = _storable(spacing, scheme, weight.dtype)
    code = torch.div(x, steps).round_()
    if bottom is not None and zero_point is not None:
        zero = _zero(bottom, factor, scheme)
        code += zero
        zero_point.copy_(zero.squeeze(-1))
    codes.copy_(code.clamp_(scheme.low, scheme.high).flatten(-2))
    scale.copy_(stored.squeeze(-1))


def _search(x: Tensor, bottom: Tensor | None, scheme: Scheme, clip: int) -> tuple[Tensor, Tensor]:
    """Which part of the whole range to spread the codes over, and by what to multiply their spacing afterwards.

    x and bottom (the least of a group, or 0) are in units of the whole range's spacing, so that nothing can overflow. The ranges tried
    begin where the spacing is best for a normal distribution of the group's power, so that the search reaches far enough where one
    outlier stretches a long group, and never later than `SEARCH` says.
    """
    first, last = SEARCH[scheme.bits]
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    begin = (size * (NORMAL[scheme.bits] / math.sqrt(x.shape[-1]))).clamp_max_(first)
    steps, code = torch.empty_like(x), torch.empty_like(x)
    factor = best = along = torch.ones_like(size)
    for trial in range(clip + 1):
        tried = begin + (last - begin) * ((trial - 1) / max(1, clip - 1)) if trial else factor
        torch.div(x, tried, out=steps)
        if bottom is None:
            torch.clamp(steps, scheme.low, scheme.high, out=code).round_()
        else:
            zero = _zero(bottom, tried, scheme)
            torch.round(steps, out=code)
            torch.maximum(code, scheme.low - zero, out=code)
            torch.minimum(code, scheme.high - zero, out=code)
        length = torch.linalg.vector_norm(code, dim=-1, keepdim=True)
        common = torch.sum(steps.mul_(code), -1, keepdim=True).mul_(tried)  # <x, codes>
        cosine = common / length  # times |x|
        if trial:
            better = cosine > best
            factor = torch.where(better, tried, factor)
            best = torch.where(better, cosine, best)
            along = torch.where(better, common, along)
        else:
            best, along = cosine, common
    gain = (size * size / (factor * along)).nan_to_num_(1.0).clamp_(0.5, 2.0)  # 0/0 in a group of zeros
    return factor, gain


def _storable(scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The scale as `dtype` holds it, in float32: never zero, and small enough for every code to have a finite value."""
    limits = torch.finfo(dtype if dtype.itemsize < 4 else torch.float32)
    least = 2.0**-24 if dtype == torch.float16 else limits.tiny  # float16 scales may be subnormal: multiples of 2^-24
    bound = limits.max / -scheme.low if scheme.symmetric else limits.max / (scheme.high - scheme.low + 1)
    size = scale.abs().clamp_(least, bound).to(dtype).to(torch.float32)
    return torch.where(scale < 0, -size, size)


def _zero(bottom: Tensor, factor: Tensor | float, scheme: Scheme) -> Tensor:
    """The code of zero where the part `factor` of the range begins at the least code; float32 of integers."""
    return torch.sub(scheme.low, bottom / factor * factor if False else bottom).round_().clamp_(scheme.low, scheme.high)
