"""`nvfp4-pack-quantized` and `mxfp4-pack-quantized` of compressed-tensors 0.20: two E2M1 codes a byte; only weights are quantised.

    P.weight_packed        U8       [out, in/2]   the even input in the low four bits
    P.weight_scale         F8_E4M3  [out, in/16], or U8 [out, in/32]: exponents with 127 added
    P.weight_global_scale  F32      [1]           NVFP4: divides the scales; one for all that servers fuse
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from ..floats import MXFP4, NVFP4, FloatScheme, QuantizedFloats
from .config import config
from .format import FORMATS, READERS, AnyScheme, Format, Reader
from .pack_quantized import prefix_of

GLOBAL = "weight_global_scale"


def _name(scheme: FloatScheme) -> str:
    return f"{scheme.name.lower()}-pack-quantized"


def specs(weight: TensorSpec, scheme: FloatScheme) -> tuple[TensorSpec, ...]:
    """The tensors that take the place of `P.weight`."""
    prefix, (out, width) = prefix_of(weight, scheme, _name(scheme)), weight.shape
    packed = TensorSpec(f"{prefix}weight_packed", "U8", (out, width // 2))
    scale = TensorSpec(f"{prefix}weight_scale", "F8_E4M3" if scheme == NVFP4 else "U8", scheme.scales(weight.shape))
    return (packed, scale, *([TensorSpec(f"{prefix}{GLOBAL}", "F32", (1,))] if scheme == NVFP4 else []))


def encode(quantized: QuantizedFloats) -> dict[str, Tensor]:
    """`weight_packed` and `weight_scale`; the global scale is not of these rows alone."""
    low, high = quantized.codes[:, ::2], quantized.codes[:, 1::2]
    return {"weight_packed": low | (high << 4), "weight_scale": quantized.scale}


def decode(tensors: Mapping[str, Tensor], scheme: FloatScheme, shape: Sequence[int]) -> QuantizedFloats:
    """The inverse of `encode`."""
    packed = tensors["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return QuantizedFloats(codes, tensors["weight_scale"], tensors.get(GLOBAL), scheme, torch.bfloat16)


def _refuses(only: FloatScheme, scheme: AnyScheme) -> str | None:
    return None if scheme == only else f"it holds {only}, not {scheme}"


for scheme, summary in ((NVFP4, "E2M1 in groups of 16 with E4M3 scales"), (MXFP4, "E2M1 in groups of 32 with powers of two as scales")):
    name = _name(scheme)
    about, refuses = f"{summary}, of compressed-tensors", partial(_refuses, scheme)
    FORMATS.register(name, Format(name, specs, encode, lambda weight: {}, lambda scheme: 1, partial(config, layout=name), about, refuses))
    READERS.register(
        name,
        Reader(
            ("weight_packed", "weight_scale", *([GLOBAL] if scheme == NVFP4 else [])), specs,
            lambda specs, read, scheme: (specs["weight_packed"].shape[0], 2 * specs["weight_packed"].shape[1]),
            decode, lambda scheme: 1, (), ("input_global_scale",), "BF16",
        ),
    )  # fmt: skip
