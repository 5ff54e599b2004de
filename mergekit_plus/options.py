"""A function's keyword-only parameters are its options: one place for name, default, help and check.

    def ties(base, models, *, density: PerModel[Density] = (1.0,), lambda_: Annotated[float, Field(...)] = 1.0): ...

`lambda_` is spelt `lambda` outside Python. A `PerModel` option takes one value for all models or one for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from .errors import OptionError, nearest

T = TypeVar("T")


class _PerModelTag:
    """Marks an option that has one value for each model."""


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


PerModel = Annotated[tuple[T, ...], BeforeValidator(_as_tuple), _PerModelTag()]


@dataclass(frozen=True)
class SearchRange:
    """Marks a number with the values among which a search looks first, narrower than those that are allowed."""

    low: float
    high: float


@dataclass(frozen=True)
class Option:
    """One option as a user meets it."""

    name: str
    help: str
    default: object
    required: bool
    per_model: bool
    number: type[int] | type[float] | None = None  # what it counts in; None for what is no number
    search: tuple[float, float] | None = None  # where a search looks; None where bounds must be given
    choices: tuple[object, ...] = ()  # all of its values, where they are a few names

    @property
    def type(self) -> str:
        """What kind of value it is, in a word, or the values themselves."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        default = self.default[0] if isinstance(self.default, tuple) and self.default else self.default
        if isinstance(default, bool):
            return "true or false"
        return {int: "integer", float: "number", None: "text"}[self.number]

    @property
    def keyword(self) -> str:
        """The Python name of the parameter."""
        return "lambda_" if self.name == "lambda" else self.name


class Options:
    """The options of one function, read from its keyword-only parameters (those in `inside` are not options)."""

    def __init__(self, owner: str, function: Callable[..., Any], inside: Sequence[str] = ()) -> None:
        self.owner = owner
        self.function = function
        self.inside = tuple(inside)

    @cached_property
    def _parameters(self) -> dict[str, tuple[Any, inspect.Parameter]]:
        hints = get_type_hints(self.function, include_extras=True)
        return {
            name.rstrip("_"): (hints[name], parameter)
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in self.inside
        }

    @cached_property
    def table(self) -> dict[str, Option]:
        """Every option by its name, in the order of the signature."""
        return {
            name: Option(
                name,
                _description(hint),
                None if parameter.default is parameter.empty else parameter.default,
                parameter.default is parameter.empty,
                _is_per_model(hint),
                _number(hint),
                _search_range(hint),
                _choices(hint),
            )
            for name, (hint, parameter) in self._parameters.items()
        }

    @cached_property
    def _model(self) -> type[BaseModel]:
        fields: dict[str, Any] = {
            name: (hint, ... if parameter.default is parameter.empty else parameter.default)
            for name, (hint, parameter) in self._parameters.items()
        }
        return create_model(self.owner, __config__=ConfigDict(extra="forbid", validate_default=True), **fields)

    def problems(self, given: Mapping[str, object], models: int | None = None) -> list[str]:
        """Everything wrong with these values, a sentence each; empty when all is well."""
        found = [
            f"{self.owner} has no option '{name}'.{nearest(name, self.table)}" for name in given if name not in self.table
        ]
        known = {name: value for name, value in given.items() if name in self.table}
        try:
            values = self._model.model_validate(known)
        except ValidationError as error:
            for problem in {(one["loc"][0], one["msg"]): one for one in error.errors()}.values():  # a list may be wrong in the same way twice
                name = str(problem["loc"][0])
                if problem["type"] == "missing":
                    found.append(f"{self.owner} needs the option '{name}': {self.table[name].help}")
                else:
                    found.append(f"{self.owner}: {name}={given.get(name)!r}: {problem['msg']}")
            return found + self._lengths(known, models)
        return found + self._lengths({name: getattr(values, name) for name in self.table}, models)

    def _lengths(self, values: Mapping[str, object], models: int | None) -> list[str]:
        """A sentence for each per-model option that has neither one value nor one for each model."""
        found = []
        for name, value in values.items():
            option, many = self.table[name], value if isinstance(value, list | tuple) else (value,)
            if option.per_model and models is not None and len(many) not in (1, models):
                found.append(f"{self.owner}: {name} has {len(many)} values for {models} models; give one, or one for each")
        return found

    def check(self, given: Mapping[str, object], models: int | None = None) -> dict[str, Any]:
        """The keyword arguments for the function, checked, defaults filled in, per-model values one for each model.

        Errors: OptionError naming every problem.
        """
        found = self.problems(given, models)
        if found:
            raise OptionError("; ".join(found))
        values = self._model.model_validate(dict(given))
        arguments: dict[str, Any] = {}
        for name, option in self.table.items():
            value = getattr(values, name)
            if option.per_model and models is not None and len(value) == 1:
                value = value * models
            arguments[option.keyword] = value
        return arguments


def _description(hint: object) -> str:
    for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if isinstance(extra, FieldInfo) and extra.description:
            return extra.description
    for inner in get_args(hint):
        if text := _description(inner):
            return text
    return ""


def _is_per_model(hint: object) -> bool:
    return get_origin(hint) is Annotated and any(isinstance(extra, _PerModelTag) for extra in get_args(hint)[1:])


def _number(hint: object) -> type[int] | type[float] | None:
    if hint is float or hint is int:
        return float if hint is float else int
    inner = () if get_origin(hint) is Literal else get_args(hint)
    return next((found for part in inner if (found := _number(part))), None)


def _choices(hint: object) -> tuple[object, ...]:
    """The values of a `Literal`; none for one that is part of a wider type."""
    if get_origin(hint) is Annotated:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Literal else ()


def _search_range(hint: object) -> tuple[float, float] | None:
    """What `SearchRange` says, else the least and greatest value allowed; a hundredth inwards of one that is not allowed itself."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    for extra in extras:
        if isinstance(extra, SearchRange):
            return extra.low, extra.high
    bounds = {name: value for extra in extras if isinstance(extra, FieldInfo) for bound in extra.metadata
              for name in ("ge", "gt", "le", "lt") if (value := getattr(bound, name, None)) is not None}  # fmt: skip
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        inwards = (high - low) / 100
        return low + inwards * ("ge" not in bounds), high - inwards * ("le" not in bounds)
    return next((found for part in get_args(hint) if (found := _search_range(part))), None)
