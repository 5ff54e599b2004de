"""How a pruner is written: one file, one pure function, its options in its signature.

    @pruner("wanda", calibrated=True, scopes=("row", "tensor", "block"))
    def wanda(weight, *, moments) -> Tensor: ...

A pruner says how much each weight counts: it gets some rows of a weight `[rows, inputs]` in their own dtype and returns scores of their shape, float32
or float64, none of them negative; which weights go follows from what is compared with what (`scopes`, the first one by default) and from how many are to go.
Of a parameter `noise` and `moments` it gets the random bits of these elements and the moments of the layer's inputs.

A pruner that changes the weights that stay as well (`solves`) gets a whole weight, `sparsity` and `moments`, and returns the pruned weight in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from mergekit_plus.options import Options
from mergekit_plus.registry import Registry

Scope = Literal["row", "tensor", "block", "global", "columns"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
INSIDE = ("noise", "moments")


@dataclass(frozen=True)
class Pruner:
    """A pruner and what a plan must know of it."""

    name: str
    function: Callable[..., Tensor]
    options: Options = field(compare=False)
    scopes: tuple[Scope, ...]
    calibrated: bool = False
    solves: bool = False

    @property
    def takes_noise(self) -> bool:
        return "noise" in inspect.signature(self.function).parameters

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


PRUNERS: Registry[Pruner] = Registry("pruner")


def pruner(
    name: str, *, scopes: tuple[Scope, ...], calibrated: bool = False, solves: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a pruner. scopes: what its weights can be compared within, the default first."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        PRUNERS.register(name, Pruner(name, function, Options(name, function, inside=INSIDE), scopes, calibrated, solves))
        return function

    return register
