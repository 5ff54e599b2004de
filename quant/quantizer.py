"""How a quantiser is written: one file, one pure function, its options in its signature.

    @quantizer("rtn")
    def rtn(weight, scheme, *, clip: Annotated[int, Field(description="...")] = 6) -> Quantized: ...

The function gets rows of one weight `[rows, in]` in their own dtype and a scheme that fits them. Row i of the result depends on
row i of the weight and on nothing else, so that any weight can be fed in pieces.

    @quantizer("gptq", calibrated=True)
    def gptq(weight, scheme, moments, *, damp: Annotated[float, Field(description="...")] = 0.01) -> Quantized: ...

A calibrated one gets the whole weight `[out, in]` and the `Moments` of the layer's inputs as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from mergekit_plus.options import Options
from mergekit_plus.registry import Registry

from .quantized import Quantized


@dataclass(frozen=True)
class Quantizer:
    """A quantiser and what a plan must know of it."""

    name: str
    function: Callable[..., Quantized]
    options: Options = field(compare=False)
    calibrated: bool = False

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


QUANTIZERS: Registry[Quantizer] = Registry("quantizer")


def quantizer(name: str, calibrated: bool = False) -> Callable[[Callable[..., Quantized]], Callable[..., Quantized]]:
    """Register a quantiser."""

    def register(function: Callable[..., Quantized]) -> Callable[..., Quantized]:
        QUANTIZERS.register(name, Quantizer(name, function, Options(name, function), calibrated))
        return function

    return register
