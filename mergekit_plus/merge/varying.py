"""Options that differ from layer to layer: by depth, or by kind of layer, where a number would be.

    lambda: {depth: [0.2, 0.4, 0.6]}                  the first layer, the middle, the last; in between in straight lines
    lambda: {attention: 0.3, mlp: 0.5, rest: 0.4}     rest: everything else, and a kind that is not named

An option with one value for each model may have such a table for one of them. Where a tensor stands is `layers.Position`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from ..layers import KINDS, Position, between
from .method import MergeMethod


def varies(options: Mapping[str, object]) -> bool:
    """Whether any of them has a table."""
    return any(map(_tables, options.values()))


def at(options: Mapping[str, Any], position: Position) -> dict[str, Any]:
    """What the options are for a tensor at this place."""
    return {name: _at(value, position) for name, value in options.items()}


def problems(method: MergeMethod, options: Mapping[str, object]) -> list[str]:
    """What is wrong with tables, a sentence each; whether their numbers are allowed is for the method to say of `corners`."""
    found = []
    for name, value in options.items():
        tables, option = _tables(value), method.options.table.get(name)
        if wrong := [table for table in tables if not _is_well_formed(table)]:
            found.append(f"{method.name}: {name}={wrong[0]}: write {{depth: [first, ..., last]}} or {{attention: a, mlp: b, rest: c}}, all of them numbers")
        elif tables and option is not None and option.number is not float:
            found.append(f"{method.name}: {name} is the same for all layers; only what is measured in fractions may vary")
        elif tables and method.scope == "model" and name in method.measured_by:
            found.append(f"{method.name} measures the whole model by {name}, which may not vary from layer to layer")
    return found


def corners(options: Mapping[str, object]) -> list[dict[str, Any]]:
    """The options wherever one of them is at a point of its table: nearly always all else is allowed where these are (`merge` looks at each tensor)."""
    tables = [table for value in options.values() for table in _tables(value)]
    places = {0.0} | {point / (len(table["depth"]) - 1) for table in tables if "depth" in table for point in range(1, len(table["depth"]))}
    kinds = KINDS if any("depth" not in table for table in tables) else ("rest",)
    return [at(options, Position(along, kind)) for along, kind in product(sorted(places), kinds)]


def numbers(value: Any) -> Iterator[float]:
    """The numbers in an option's value: one, or those in its lists and tables, in their order."""
    if isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from numbers(part)
    else:
        yield value


def filled(value: Any, found: Iterator[float]) -> Any:
    """A value of the same form with other numbers."""
    if isinstance(value, Mapping):
        return {name: filled(part, found) for name, part in value.items()}
    return [filled(part, found) for part in value] if isinstance(value, list | tuple) else next(found)


def _tables(value: object) -> list[Mapping[str, Any]]:
    return [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, Mapping)]


def _at(value: Any, position: Position) -> Any:
    if isinstance(value, list | tuple):
        return [_at(part, position) for part in value]
    if not isinstance(value, Mapping):
        return value
    return between(value["depth"], position.along) if "depth" in value else value.get(position.kind, value["rest"])


def _is_well_formed(table: Mapping[str, Any]) -> bool:
    points = table["depth"] if table.keys() == {"depth"} else list(table.values()) if {"rest"} <= table.keys() <= {*KINDS} else None
    return isinstance(points, list | tuple) and len(points) > 0 and all(type(point) in (int, float) and math.isfinite(point) for point in points)
