"""What a search looks for: the `search:` key of a merge step, and the axes that it spans.

    search: {options: {lambda: [0, 2], "ratio": null}, texts: {code: code.txt}, objective: mean, budget: 40}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import OptionError, nearest
from ..layers import KINDS as KINDS_OF_LAYERS
from ..layers import Position
from ..merge import METHODS, MergeMethod, varying

EACH = "each"  # `lambda:each`: one value for each model, searched on its own
KINDS = "kinds"  # `lambda:kinds`: for each kind of layer
DEPTH = "depth"  # `lambda:depth3`: for each of three points along the stack of layers
_HOW = re.compile(rf"{EACH}|{KINDS}|{DEPTH}(?:[2-9]|[1-9]\d)")
DIGITS = 4  # of a value that is tried; more would be noise in a recipe

Bounds = tuple[float, float]


class SearchOptions(BaseModel):
    """`search:` in a merge step."""

    model_config = ConfigDict(extra="forbid")

    options: dict[str, Bounds | None]  # by name, or `name:each`, `name:depth3`, `name:kinds`; bounds by default those of the option
    texts: dict[str, str]
    objective: Literal["mean", "worst", "kl"] = "mean"
    budget: int = Field(40, ge=2, description="models that are measured")
    window: int | None = Field(None, gt=1, description="tokens; 256, or what the model takes")
    windows: int = Field(8, gt=0, description="of each text, spread evenly over it")
    heldout: dict[str, str] = Field(default_factory=dict, description="texts on which the outcome is measured")

    @field_validator("options", mode="before", json_schema_input_type=dict[str, Any] | list[str])
    @classmethod
    def _names_alone(cls, value: object) -> object:
        return dict.fromkeys(value) if isinstance(value, list) else value

    def problems(self, method: str, options: Mapping[str, Any], models: Sequence[str], base: str | None, folder: Path) -> list[str]:
        """Everything wrong with a search over these options of a merge of these models, a sentence each."""
        found = [f"search: the text {name} is not at {folder / text}" for name, text in (self.texts | self.heldout).items() if not (folder / text).is_file()]
        if not self.texts:
            found.append("search: it needs `texts` (--text NAME=FILE) to measure models on, validation text that no model was tuned on")
        elif self.objective != "mean" and len(self.texts) != len(models):
            found.append(
                f"search: the objective {self.objective} needs one text for each model, in the models' order; there are {len(self.texts)} for {len(models)}"
            )
        if self.objective == "worst" and base is None:
            found.append("search: the objective worst is relative to the base's loss; name the base")
        if not self.options:
            found.append("search: it names no option")
        if method in METHODS:
            for name in self.options:
                try:
                    list(self._axes_of(name, METHODS[method], options, len(models)))
                except OptionError as error:
                    found.append(str(error))
        return found

    def axes(self, method: MergeMethod, options: Mapping[str, Any], models: int) -> list[Axis]:
        """The axes of the search; each starts where `options` or the method's defaults are. Errors: OptionError."""
        return [axis for name in self.options for axis in self._axes_of(name, method, options, models)]

    def _axes_of(self, key: str, method: MergeMethod, options: Mapping[str, Any], models: int) -> Iterable[Axis]:
        name, colon, how = key.partition(":")
        option = method.options.table.get(name)
        if option is None:
            raise OptionError(f"search: {method.name} has no option '{name}'.{nearest(name, method.options.table)}")
        if option.number is None:
            numeric = [other.name for other in method.options.table.values() if other.number]
            raise OptionError(f"search: {name} is no number, so it cannot be searched; {method.name} has {', '.join(numeric)}")
        if colon and not _HOW.fullmatch(how):
            raise OptionError(f"search: {key}: after the colon stands each, kinds, or depth and how many points from 2 to 99, as in {name}:depth3")
        if how == EACH and not option.per_model:
            raise OptionError(f"search: {name} of {method.name} is one value for all models; leave out ':{EACH}'")
        for problem in varying.problems(method, options) + varying.problems(method, {name: {"rest": 0}} if how not in ("", EACH) else {}):
            raise OptionError(f"search: {problem}")
        for other in takewhile(lambda other: other != key, self.options):
            if other.partition(":")[0] == name:
                raise OptionError(f"search: {key} and {other} are the same option; name one of them")
        bounds = self.options[key] or option.search
        if bounds is None:
            raise OptionError(f"search: {name} of {method.name} has no bounds of its own; give them, as in {name}=0..1")
        low, high = bounds
        if not low < high:
            raise OptionError(f"search: {name}={low:g}..{high:g}: the first bound must be below the second")
        for bound in bounds:
            for problem in method.options.problems({name: option.number(bound)}):
                raise OptionError(f"search: {problem}")
        whole, scale = option.number is int, method.linear_in(name, method.options.check(varying.corners(options)[0]))
        for part, start in _parts(how, options.get(name, option.default), models):
            values = [float(value) for value in varying.numbers(start)]
            yield Axis(name, part, low, high, min(max(sum(values) / len(values), low), high), whole, scale)


def _parts(how: str, start: Any, models: int) -> Iterable[tuple[int | str | None, Any]]:
    """What of an option is searched on its own, as `Axis.part`, and where it starts: the mean of the numbers there."""
    if not how:
        yield None, start
    elif how == EACH:
        one = not isinstance(start, list | tuple)
        yield from ((model, start if one else start[model % len(start)]) for model in range(models))
    elif how == KINDS:
        yield from ((kind, varying.at({how: start}, Position(0.5, kind))[how]) for kind in KINDS_OF_LAYERS)
    else:
        points = int(how.removeprefix(DEPTH))
        yield from ((DEPTH, varying.at({how: start}, Position(point / (points - 1), "rest"))[how]) for point in range(points))


@dataclass(frozen=True)
class Axis:
    """One number that is searched: an option, or a part of it: of one model (its number), of a kind of layer, or the next point of its "depth"."""

    option: str
    part: int | str | None
    low: float
    high: float
    start: float
    whole: bool = False  # the option counts something
    scale: bool = False  # the result is linear in it

    def at(self, place: float) -> float:
        """The value at a place in [0, 1], as it is written into a recipe."""
        value = self.low + (self.high - self.low) * min(max(place, 0.0), 1.0)
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def place(self, value: float) -> float:
        """Where a value lies in [0, 1]."""
        return (value - self.low) / (self.high - self.low)


def values_of(axes: Sequence[Axis], point: Sequence[float]) -> dict[str, Any]:
    """Option values as a recipe has them: a number, a list of one for each model, or a table by depth or kind of layer."""
    values: dict[str, Any] = {}
    for axis, value in zip(axes, point, strict=True):
        if axis.part is None:
            values[axis.option] = value
        elif axis.part == DEPTH:
            values.setdefault(axis.option, {DEPTH: []})[DEPTH].append(value)
        elif isinstance(axis.part, str):
            values.setdefault(axis.option, {})[axis.part] = value
        else:
            values.setdefault(axis.option, []).append(value)
    return values


def parse_axes(text: str) -> dict[str, Bounds | None]:
    """`lambda,ratio=0.05..0.8,weight:each` as the table that `options` takes. Errors: OptionError."""
    found: dict[str, Bounds | None] = {}
    for part in text.split(","):
        name, equals, bounds = part.strip().partition("=")
        low, _, high = bounds.partition("..")
        try:
            found[name] = (float(low), float(high)) if equals else None
        except ValueError:
            raise OptionError(f"--search {part}: write the bounds as {name}=0..1") from None
    return found
