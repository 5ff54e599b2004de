"""`dense`: the quantised weight written out in the dtype it had, for any program that reads the model; no bytes are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from ..floats import QuantizedFloats, float_values
from ..quantized import Scheme, dequantize
from .format import FORMATS, AnyScheme, Codes, Format


def specs(weight: TensorSpec, scheme: AnyScheme) -> tuple[TensorSpec, ...]:
    """`P.weight` as it was."""
    return (weight,)


def encode(quantized: Codes) -> dict[str, Tensor]:
    """The values, in the weight's dtype."""
    return {"weight": float_values(quantized) if isinstance(quantized, QuantizedFloats) else dequantize(quantized)}


def fixed(weight: TensorSpec) -> dict[str, Tensor]:
    """Nothing."""
    return {}


def row_unit(scheme: AnyScheme) -> int:
    """Rows are independent, but for those that share scales in blocks."""
    return 1 if isinstance(scheme, Scheme) else scheme.outputs


def config(layers: Mapping[str, AnyScheme], ignore: Sequence[str]) -> None:
    """Nothing: the checkpoint is an ordinary one."""
    return None


FORMATS.register("dense", Format("dense", specs, encode, fixed, row_unit, config, "the dequantized weights; no bytes are saved"))
