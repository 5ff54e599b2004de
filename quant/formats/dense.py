"""`dense`: the quantised weight written out in the dtype it had, for any program that reads the model; no bytes are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from .format import FORMATS, AnyScheme, Codes, Format, rows_of_a_block, values_of


def specs(weight: TensorSpec, scheme: AnyScheme) -> tuple[TensorSpec, ...]:
    """`P.weight` as it was."""
    return (weight,)


def encode(quantized: Codes) -> dict[str, Tensor]:
    """The values, in the weight's dtype."""
    return {"weight": values_of(quantized)}


def fixed(weight: TensorSpec) -> dict[str, Tensor]:
    """Nothing."""
    return {}


def config(layers: Mapping[str, AnyScheme], ignore: Sequence[str]) -> None:
    """Nothing: the checkpoint is an ordinary one."""
    return None


FORMATS.register("dense", Format("dense", specs, encode, fixed, rows_of_a_block, config, "the dequantized weights; no bytes are saved"))
