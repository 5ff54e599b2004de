"""`dense`: the quantised weight written out in the dtype it had, for any program that reads the model; no bytes are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from ..quantized import Quantized, Scheme, dequantize
from .format import FORMATS, Format


def specs(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """`P.weight` as it was."""
    return (weight,)


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """The values, in the dtype of the scales, which is the weight's."""
    return {"weight": dequantize(quantized)}


def fixed(weight: TensorSpec) -> dict[str, Tensor]:
    """Nothing."""
    return {}


def row_unit(scheme: Scheme) -> int:
    """Rows are independent."""
    return 1


def config(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> None:
    """Nothing: the checkpoint is an ordinary one."""
    return None


FORMATS.register("dense", Format("dense", specs, encode, fixed, row_unit, config, "the dequantised weights; no bytes are saved"))
