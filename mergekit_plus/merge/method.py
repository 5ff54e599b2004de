"""How a merge method is written: one file, one pure function, its options in its signature.

    @merge_method("task_arithmetic")
    def task_arithmetic(base, models, *, weight: PerModel[Weight] = (1.0,), lambda_: Lambda = 1.0) -> Tensor: ...

The function gets the same rows of one tensor from every input, in the inputs' own dtypes, and returns the merged rows in
float32 (float64 where an input is float64); the caller rounds once. How a tensor may be cut is the method's `unit`: an "element"
of the result depends on that element of the inputs and on nothing else, and any rows may be fed alone; a "row" method works along
the last dimension and gets whole rows, a tensor of one dimension being one row; a "tensor" method (a singular value
decomposition) gets whole tensors. What a method must know beyond its unit (a norm, a threshold) is a *statistic*: a second pure
function over a `Scan`, whose result arrives as `measured`.

Facts that a plan needs before it reads anything are read off the signature: a parameter `base: Tensor` means that the method
needs a base model, `base: Tensor | None` that it takes one; `measured`, `noise` and `first` (the flat index of the piece's first
element) are filled in by the plan; every other keyword-only parameter is an option. Options that fit one by one but not together
are refused by the method's `check`, at plan time too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from pydantic import Field
from torch import Tensor

from ..checkpoint import TensorSpec
from ..checkpoint.plan import row_multiple
from ..options import Options, PerModel, SearchRange
from ..registry import Registry
from ..statistics import Scan

__all__ = [
    "METHODS",
    "Density",
    "Int8Mask",
    "Lambda",
    "MergeMethod",
    "Normalize",
    "PerModel",
    "Rescale",
    "Scan",
    "Unit",
    "Weight",
    "merge_method",
    "scaled",
    "task_vectors",
    "working_dtype",
]

INSIDE = ("measured", "noise", "first")
Unit = Literal["element", "row", "tensor"]

Weight = Annotated[float, Field(description="how much of this model goes in", allow_inf_nan=False), SearchRange(0, 1)]
Density = Annotated[float, Field(gt=0, le=1, description="share of the task vector that is kept"), SearchRange(0.05, 1)]
Lambda = Annotated[float, Field(description="scale of the merged task vector", allow_inf_nan=False), SearchRange(0, 2)]
Normalize = Annotated[bool, Field(description="divide by the sum of the weights")]
Rescale = Annotated[bool, Field(description="make up for the elements that were dropped")]
Int8Mask = Annotated[bool, Field(description="no effect; accepted because recipes carry it")]


@dataclass(frozen=True)
class MergeMethod:
    """A method and what a plan must know of it."""

    name: str
    function: Callable[..., Tensor]
    statistic: Callable[..., Any] | None
    scope: Literal["tensor", "model"]
    models: tuple[int, int | None]
    options: Options = field(compare=False)
    unit: Unit = "element"
    check: Callable[[Mapping[str, Any]], None] | None = None  # refuses options that do not go together; before any read
    linear: tuple[str, ...] = ()
    passes: int = 1  # how often the statistic reads everything, about

    @cached_property
    def inside(self) -> tuple[str, ...]:
        """What the plan fills in besides the options."""
        return tuple(name for name in INSIDE if name in inspect.signature(self.function).parameters)

    @cached_property
    def takes_base(self) -> bool:
        """Whether the base goes into the arithmetic, if there is one."""
        return "base" in inspect.signature(self.function).parameters

    @cached_property
    def needs_base(self) -> bool:
        return self.takes_base and type(None) not in get_args(get_type_hints(self.function)["base"])

    @cached_property
    def statistic_takes(self) -> frozenset[str]:
        """The arguments of the statistic, by their names."""
        return frozenset(inspect.signature(self.statistic).parameters if self.statistic else ())

    @cached_property
    def measured_by(self) -> frozenset[str]:
        """The options that the statistic depends on."""
        return frozenset(name for name, option in self.options.table.items() if option.keyword in self.statistic_takes)

    @property
    def random(self) -> bool:
        return "noise" in inspect.signature(self.function).parameters

    def linear_in(self, option: str, arguments: Mapping[str, Any]) -> bool:
        """Whether the result is `f(0) + sum_i x_i (f(e_i) - f(0))` in the values x of this option, all else held; normalized weights are not."""
        return option in self.linear and not (option == "weight" and arguments.get("normalize", False))

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    def multiple(self, spec: TensorSpec) -> int:
        """How a tensor may be cut for this method: the `multiple` of its step."""
        whole = self.unit == "tensor" or (self.unit == "row" and len(spec.shape) < 2)
        return 0 if whole else row_multiple(spec)


METHODS: Registry[MergeMethod] = Registry("merge method")


def merge_method(
    name: str,
    *,
    unit: Unit = "element",
    statistic: Callable[..., Any] | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    models: tuple[int, int | None] = (1, None),
    check: Callable[[Mapping[str, Any]], None] | None = None,
    linear: tuple[str, ...] = (),
    passes: int = 1,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a merge method.

    unit: what must be fed whole. statistic: `statistic(scan, **options)`, called with those options of the method that its signature
    names, and with `models`, how many there are, where it names that; once for each tensor (scope "tensor") or once for the whole model
    (scope "model"). models: least and most models besides the base. check: gets the function's keyword arguments, each fit on its own, and raises
    OptionError where they do not go together.
    linear: the options in which the result is linear (`MergeMethod.linear_in`), so that a search need not merge again.
    passes: how often the statistic goes over everything, for plans.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        options = Options(name, function, inside=INSIDE)
        METHODS.register(name, MergeMethod(name, function, statistic, scope, models, options, unit, check, linear, passes))
        return function

    return register


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor * tensor` in `dtype`, as a new tensor."""
    same = tensor.to(dtype)
    return same * factor if same is tensor else same.mul_(factor)


def task_vectors(base: Tensor, models: Sequence[Tensor]) -> Iterator[Tensor]:
    """`model - base` of each model in the working dtype, as new tensors."""
    dtype = working_dtype(base, *models)
    start = base.to(dtype)
    for model in models:
        same = model.to(dtype)
        yield same - start if same is model else same.sub_(start)
