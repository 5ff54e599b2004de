"""What a parameter is for one tensor: filters, gradients, and which scope speaks first, as in mergekit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from ..errors import OptionError
from ..layers import between
from ..merge import METHODS
from ..merge.plan import OptionsOf
from .schema import Conditional, Parameters, Scalar


def options_of(
    method: str,
    own: Sequence[Parameters],
    common: Sequence[Parameters],
    old_names: Sequence[Mapping[str, str]],
    place: Callable[[str], float],
) -> Mapping[str, object] | OptionsOf:
    """The options of a method, one table where they do not vary, else a function of the output tensor's name.

    own: each model's own parameters; common: those of the scopes around it, the nearest first. old_names: what each model calls a tensor,
    where it is not the output's name. place: how far along its slice the layer of a tensor is, 0 to 1; 0 for what is in no layer.
    """
    table = METHODS[method].options.table

    def given(name: str) -> dict[str, object]:
        found: dict[str, object] = {}
        t = place(name)
        for option in table.values():
            default = option.default[0] if option.per_model and isinstance(option.default, tuple) else option.default
            discrete = isinstance(default, bool | str)
            if not option.per_model:
                value = _first(common, option.name, name, t, discrete)
                if value is not None:
                    found[option.name] = value
                continue
            values = [
                _first((parameters, *common), option.name, names.get(name, name), t, discrete) for parameters, names in zip(own, old_names, strict=True)
            ]
            if any(value is not None for value in values):
                if option.required and None in values:
                    raise OptionError(f"{method} needs the option '{option.name}' for every model, and number {values.index(None) + 1} has none")
                found[option.name] = [default if value is None else value for value in values]
        return found

    varies = any(map(varying, chain(own, common)))
    return given if varies else given("")


def varying(parameters: Parameters) -> bool:
    """Whether any of them may differ from tensor to tensor."""
    return any(is_gradient(setting) or setting[0].filter not in (None, "*") for setting in parameters.values())


def has_gradient(parameters: Parameters) -> bool:
    """Whether any of them depends on where the layer stands."""
    return any(map(is_gradient, parameters.values()))


def is_gradient(setting: Sequence[Conditional]) -> bool:
    return any(isinstance(conditional.value, list) for conditional in setting)


def _first(scopes: Sequence[Parameters], option: str, tensor: str, t: float, discrete: bool) -> Scalar | None:
    """The value from the first scope that has one for this tensor."""
    for parameters in scopes:
        for conditional in parameters.get(option, ()):
            if conditional.filter in (None, "*") or conditional.filter in tensor:
                return at(conditional.value, t, discrete)
    return None


def at(value: Scalar | list[Scalar], t: float, discrete: bool = False) -> Scalar:
    """A gradient's value at `t`: between its points in a straight line; of words and truth values the one begun."""
    if not isinstance(value, list):
        return value
    if discrete or any(isinstance(point, bool) for point in value) or not all(map(_is_number, value)):
        return value[int(t * (len(value) - 1))]
    return between([float(point) for point in value], t)


def _is_number(point: Scalar) -> bool:
    """YAML reads 1e-3 as text."""
    try:
        float(point)
    except ValueError:
        return False
    return True
