"""One layer to quantise: its weight, its scheme, the method, and the tensors that take the weight's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import TensorSpec
from mergekit_plus.checkpoint.dtypes import TAGS
from mergekit_plus.checkpoint.finite import is_finite, nonfinite
from mergekit_plus.errors import CheckpointError
from mergekit_plus.moments import Moments

from .floats import FloatScheme, round_floats
from .formats import AnyScheme, Codes, Format
from .quantized import Quantized
from .quantizer import QUANTIZERS, Quantizer

UNSEEN = "no text flows through it: rounded to nearest"


@dataclass(frozen=True)
class Method:
    """How the weights of a checkpoint, which errors call `label`, are quantised and stored."""

    label: str
    quantizer: Quantizer
    arguments: Mapping[str, Any]
    layout: Format
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Layer:
    """A weight to quantise, and the tensors that hold its rows afterwards."""

    name: str
    spec: TensorSpec
    scheme: AnyScheme
    writes: tuple[TensorSpec, ...]
    method: Method

    def quantize(self, weight: Tensor, moments: Moments | None = None) -> Quantized:
        """A weight [out, in] in its stored dtype, as integers. By a calibrated method that is told no moments it is rounded to nearest, and the note says so.

        Errors: CheckpointError as `readable`.
        """
        method, weight = self.method, self.readable(weight)
        if not method.quantizer.calibrated:
            return method.quantizer.function(weight, self.scheme, **method.arguments)
        if moments is not None:
            return method.quantizer.function(weight, self.scheme, moments, **method.arguments)
        rtn = QUANTIZERS["rtn"]
        own = {name: value for name, value in method.arguments.items() if name in rtn.options.table}
        return replace(rtn.function(weight, self.scheme, **own), note=UNSEEN)

    def rounded(self, weight: Tensor, above: Tensor | None) -> Codes:
        """The same for rows of a weight without a text, or as small floats, with the scale that stands above theirs."""
        return round_floats(self.readable(weight), self.scheme, above) if isinstance(self.scheme, FloatScheme) else self.quantize(weight)

    def readable(self, weight: Tensor) -> Tensor:
        """The weight in the dtype in which the format stores scales, so that codes are chosen against the scale as stored.

        Errors: CheckpointError for a weight that is not finite, or is not in that dtype, unless that is allowed.
        """
        method = self.method
        if not method.allow_nonfinite and not is_finite(weight):
            raise nonfinite(method.label, self.name, weight)
        weight = weight.to(method.layout.dtype or weight.dtype)
        if not method.allow_nonfinite and not is_finite(weight):
            raise CheckpointError(f"{method.label}: {self.name} holds values that {TAGS[weight.dtype]} cannot, in which {method.layout.name} stores scales")
        return weight

    def encode(self, quantized: Codes) -> dict[str, Tensor]:
        """What is written, by its name."""
        prefix = self.name.removesuffix("weight")
        return {f"{prefix}{part}": tensor.to("cpu") for part, tensor in self.method.layout.encode(quantized).items()}


class Rows:
    """Quantise and encode rows of a weight: what a step runs."""

    def __init__(self, layer: Layer, device: str) -> None:
        self.layer, self.device = layer, device

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        (weight,) = tensors
        with torch.no_grad():
            return list(self.layer.encode(self.layer.rounded(weight.to(self.device), measured)).values())
