"""`int-quantized` and `float-quantized` of compressed-tensors 0.20: a code a byte under the weight's own name; servers round activations as well (W8A8, FP8).

    P.weight        I8 or F8_E4M3  [out, in]
    P.weight_scale  as P.weight was, [out, 1], or [ceil(out/128), ceil(in/128)] for FP8_BLOCK

`naive-quantized` is the same without activations. What is read may have one scale for all (`[1]`), groups, and zero points a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from ..floats import FloatScheme, QuantizedFloats
from ..quantized import Quantized, Scheme
from .config import config
from .format import FORMATS, READERS, AnyScheme, Codes, Format, Reader, rows_of_a_block
from .pack_quantized import prefix_of


def specs(weight: TensorSpec, scheme: AnyScheme) -> tuple[TensorSpec, ...]:
    """The tensors that take the place of `P.weight`."""
    layout, tag = ("int-quantized", "I8") if isinstance(scheme, Scheme) else ("float-quantized", "F8_E4M3")
    prefix = prefix_of(weight, scheme, layout)
    scales = (weight.shape[0], scheme.groups(weight.shape[1])) if isinstance(scheme, Scheme) else scheme.scales(weight.shape)
    return TensorSpec(weight.name, tag, weight.shape), TensorSpec(f"{prefix}weight_scale", weight.dtype, scales)


def encode(quantized: Codes) -> dict[str, Tensor]:
    """`weight` and `weight_scale`."""
    return {"weight": quantized.codes, "weight_scale": quantized.scale}


def _refuses_int(scheme: AnyScheme) -> str | None:
    return None if scheme == Scheme(8, 0) else f"it holds {Scheme(8, 0)} (W8A8), not {scheme}"


def _refuses_float(scheme: AnyScheme) -> str | None:
    return None if isinstance(scheme, FloatScheme) and scheme.bits == 8 else f"it holds FP8 or FP8_BLOCK, not {scheme}"


def _decode(tensors: Mapping[str, Tensor], scheme: AnyScheme, shape: Sequence[int]) -> Codes:
    codes, scale, zero = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    if isinstance(scheme, FloatScheme):
        scales = scheme.scales(shape)
        return QuantizedFloats(codes, _spread(scale, scales), None, scheme, scale.dtype)
    scales = (shape[0], scheme.groups(shape[1]))
    return Quantized(codes, _spread(scale, scales), None if scheme.symmetric or zero is None else _spread(zero, scales), scheme.bits)


def _spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """A scale for all as one for each row; others as they are, of this shape."""
    return scale.view(1, 1).expand(*shape) if scale.numel() == 1 else scale.view(*shape)


for name, refuses, summary in (
    ("int-quantized", _refuses_int, "W8A8 of compressed-tensors: int8 weights by row, activations by token"),
    ("float-quantized", _refuses_float, "FP8 of compressed-tensors: E4M3 weights by row or block, activations by token"),
):
    FORMATS.register(name, Format(name, specs, encode, lambda weight: {}, rows_of_a_block, partial(config, layout=name), summary, refuses))
    READERS.register(
        name,
        Reader(
            ("weight", "weight_scale", "weight_zero_point"), specs, lambda specs, read, scheme: (specs["weight"].shape[0], specs["weight"].shape[1]),
            _decode, rows_of_a_block, ("weight_zero_point",), ("input_scale", "input_zero_point"),
        ),
    )  # fmt: skip
