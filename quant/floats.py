"""Weights as small floats: FP8 and FP4 numbers with a scale for each row, block or group.

    FP8        E4M3, one scale a row; activations are rounded to E4M3 token by token as it runs
    FP8_BLOCK  E4M3, one scale for 128 x 128 weights, as DeepSeek-V3 is stored
    NVFP4      E2M1 in groups of 16; scales are E4M3, and one float32 scale stands above them
    MXFP4      E2M1 in groups of 32; scales are powers of two

The scale of an NVFP4 group is chosen among a few for the least squared error of the group: its largest weight need not become the largest number,
as E2M1's steps grow with it. (Two choices are "Four over six", arXiv 2512.02010.) On two small Llamas seven take a quarter off the error and the
KL divergence of compressed-tensors' one. MXFP4 has that one: a power of two less or more gained nothing.
Formats: OCP Microscaling Formats 1.0; compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

from .quantized import no_matrix
from .rtn import least_scale

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by its lower three bits; the fourth is the sign
E2M1_MAX = 6.0
# A number beyond each of these is nearer to the next of E2M1; halves go to the even code, so that every other bound is just below the middle.
_BOUNDS = [middle if index % 2 == 0 else float(torch.nextafter(torch.tensor(middle), torch.tensor(-inf))) for index, middle in
           enumerate((low + high) / 2 for low, high in zip(E2M1, E2M1[1:], strict=False))]  # fmt: skip
_NVFP4_TOPS = (6.0, 4.0, 5.0, 7.0, 4.5, 5.5, 6.5)  # where on E2M1's scale the largest weight of a group may come to lie


@dataclass(frozen=True, slots=True)
class FloatScheme:
    """How a weight `[out, in]` becomes floats of 8 or 4 bits: one scale for each `outputs` x `inputs` of its elements, 0 inputs for a whole row."""

    name: str
    bits: int
    outputs: int
    inputs: int

    def fits(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have this scheme, or None where it can."""
        if reason := no_matrix(shape):
            return reason
        if self.bits == 4 and shape[1] % self.inputs:
            return f"has {shape[1]} inputs, which groups of {self.inputs} do not divide; {self.name} has no other"
        return None

    def scales(self, shape: Sequence[int]) -> tuple[int, int]:
        """The shape of a weight's scales."""
        return -(-shape[0] // self.outputs), -(-shape[1] // self.inputs) if self.inputs else 1

    def __str__(self) -> str:
        return self.name


FP8, FP8_BLOCK = FloatScheme("FP8", 8, 1, 0), FloatScheme("FP8_BLOCK", 8, 128, 128)
NVFP4, MXFP4 = FloatScheme("NVFP4", 4, 1, 16), FloatScheme("MXFP4", 4, 1, 32)


@dataclass(frozen=True, slots=True)
class QuantizedFloats:
    """A weight in small floats."""

    codes: Tensor  # [out, in]: float8_e4m3fn, or uint8 codes of E2M1
    scale: Tensor  # of `scheme.scales`: the weight's dtype for FP8, float8_e4m3fn for NVFP4, biased exponents in uint8 for MXFP4
    global_scale: Tensor | None  # float32 [1], by which the scales of NVFP4 are too large
    scheme: FloatScheme
    dtype: torch.dtype  # of the weight that it stands for


def global_scale(largest: float) -> Tensor:
    """NVFP4's float32 [1] for weights whose largest magnitude this is: its group's scale becomes the largest of E4M3."""
    scale = E4M3_MAX * E2M1_MAX / largest if 0 < largest < inf else 1.0
    return torch.tensor([min(scale, torch.finfo(torch.float32).max)], dtype=torch.float32)


def round_floats(weight: Tensor, scheme: FloatScheme, above: Tensor | None = None) -> QuantizedFloats:
    """Rows of a weight in a scheme; computed in float32. above: NVFP4's `global_scale`; FP8_BLOCK's rows begin at a multiple of 128.

    Finite weights give finite values (float16 next to its largest may be rounded beyond it), and a group of zeros gives zeros.
    """
    x = weight.float()
    if scheme.bits == 4:
        groups = x.view(len(x), -1, scheme.inputs)  # [out, groups, group]
        if above is not None:
            above = above.to(weight.device)
        codes, scale = _nvfp4(groups, above) if above is not None else _mxfp4(groups)
        return QuantizedFloats(codes.flatten(-2), scale, above, scheme, weight.dtype)
    largest = _blocks(x, scheme).abs().amax((1, 3))  # of `scheme.scales`
    scale = (largest / E4M3_MAX).clamp_(min=least_scale(weight.dtype)).to(weight.dtype)
    codes = (x / _spread(scale.float(), scheme, x.shape)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return QuantizedFloats(codes, scale, None, scheme, weight.dtype)


def float_values(quantized: QuantizedFloats) -> Tensor:
    """The weight, bit for bit as compressed-tensors decodes it where the weight is bfloat16: computed in float32, rounded once."""
    scheme, codes = quantized.scheme, quantized.codes
    scale = _power(quantized.scale.int() - 127) if quantized.scale.dtype == torch.uint8 else quantized.scale.float()
    if quantized.global_scale is not None:
        scale = scale / quantized.global_scale
    numbers = codes.float() if scheme.bits == 8 else _numbers(codes.device)[codes.int()]
    return numbers.mul_(_spread(scale, scheme, codes.shape)).to(quantized.dtype)


def _blocks(x: Tensor, scheme: FloatScheme) -> Tensor:
    """[blocks, outputs, blocks, inputs]; where a block reaches beyond the weight there are zeros."""
    inputs = scheme.inputs or x.shape[1]
    x = pad(x, (0, -x.shape[1] % inputs, 0, -x.shape[0] % scheme.outputs))
    return x.view(-1, scheme.outputs, x.shape[1] // inputs, inputs)


def _spread(scale: Tensor, scheme: FloatScheme, shape: Sequence[int]) -> Tensor:
    """A scale for every element, or for every row."""
    if not scheme.inputs:
        return scale
    return scale.repeat_interleave(scheme.outputs, 0)[: shape[0]].repeat_interleave(scheme.inputs, 1)[:, : shape[1]]


def _nvfp4(x: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1)
    tried = []
    for top in _NVFP4_TOPS:
        scale = (largest * (above / top)).clamp_(2.0**-9, E4M3_MAX).to(E4M3)
        tried.append((scale, scale.float() / above))
    return _best(x, tried)


def _mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1)
    half, exponent = torch.frexp(largest)  # largest = half * 2^exponent, 0.5 <= half < 1
    # as compressed-tensors has it: floor(log2) of the largest, one more from 1.75 on, less the 2 of E2M1's largest number
    own = (exponent - 3 + (half >= 0.875).int()).clamp_(-126, 127)
    return _best(x, [((own + 127).to(torch.uint8), _power(own))])


def _best(x: Tensor, tried: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The codes of each group with that of these (scale as stored, what it is worth) which has the least squared error, the first of equals."""
    bounds, numbers = torch.tensor(_BOUNDS, device=x.device), _numbers(x.device)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for stored, scale in tried:
        worth = scale.unsqueeze(-1)
        units = x / worth
        codes = torch.bucketize(units.abs(), bounds, out_int32=True)
        codes = codes.to(torch.uint8) | (torch.signbit(units).to(torch.uint8) << 3)
        error = (numbers[codes.int()] * worth - x).square_().sum(-1)
        if best is None:
            best = codes, stored, error
            continue
        better = error < best[2]
        best = torch.where(better.unsqueeze(-1), codes, best[0]), _where(better, stored, best[1]), torch.where(better, error, best[2])
    assert best is not None
    return best[:2]


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where for one-byte dtypes, which float8 is not written for everywhere."""
    return torch.where(condition, yes.view(torch.uint8), no.view(torch.uint8)).view(yes.dtype)


def _numbers(device: torch.device) -> Tensor:
    """E2M1's sixteen numbers by code."""
    return torch.tensor([*E2M1, *(-number for number in E2M1)], device=device)
