"""What a search looks for: the `search:` key of a merge step, and the axes that it spans.

    search: {options: {lambda: [0, 2], "ratio": null}, texts: {code: code.txt}, objective: mean, budget: 40}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import OptionError, nearest
from ..merge import METHODS, MergeMethod

EACH = ":each"  # `lambda:each`: one value for each model, searched on its own
DIGITS = 4  # of a value that is tried; more would be noise in a recipe

Bounds = tuple[float, float]


class SearchOptions(BaseModel):
    """`search:` in a merge step."""

    model_config = ConfigDict(extra="forbid")

    options: dict[str, Bounds | None]  # by name, or `name:each`; bounds by default those of the option
    texts: dict[str, str]
    objective: Literal["mean", "worst", "kl"] = "mean"
    budget: int = Field(40, ge=2, description="models that are measured")
    window: int | None = Field(None, gt=1, description="tokens; 256, or what the model takes")
    windows: int = Field(8, gt=0, description="of each text, spread evenly over it")
    heldout: dict[str, str] = Field(default_factory=dict, description="texts on which the outcome is measured")

    @field_validator("options", mode="before")
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
        if method in list(METHODS):
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
        name, each = key.removesuffix(EACH), key.endswith(EACH)
        option = method.options.table.get(name)
        if option is None:
            raise OptionError(f"search: {method.name} has no option '{name}'.{nearest(name, method.options.table)}")
        if option.number is None:
            numeric = [other.name for other in method.options.table.values() if other.number]
            raise OptionError(f"search: {name} is no number, so it cannot be searched; {method.name} has {', '.join(numeric)}")
        if each and not option.per_model:
            raise OptionError(f"search: {name} of {method.name} is one value for all models; leave out '{EACH}'")
        if each and name in self.options:
            raise OptionError(f"search: {name} and {key} are the same option; name one of them")
        bounds = self.options[key] or option.search
        if bounds is None:
            raise OptionError(f"search: {name} of {method.name} has no bounds of its own; give them, as in {name}=0..1")
        low, high = bounds
        if not low < high:
            raise OptionError(f"search: {name}={low:g}..{high:g}: the first bound must be below the second")
        for bound in bounds:
            for problem in method.options.problems({name: option.number(bound)}):
                raise OptionError(f"search: {problem}")
        start = options.get(name, option.default)
        starts = [float(value) for value in (start if isinstance(start, list | tuple) else [start])]
        whole, scale = option.number is int, method.linear_in(name, method.options.check(options))
        if not each:
            return [Axis(name, None, low, high, min(max(sum(starts) / len(starts), low), high), whole, scale)]
        starts = starts * models if len(starts) == 1 else starts
        return [Axis(name, model, low, high, min(max(value, low), high), whole, scale) for model, value in enumerate(starts)]


@dataclass(frozen=True)
class Axis:
    """One number that is searched: an option for all models, or for one of them."""

    option: str
    model: int | None
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
    """Option values as a recipe has them: a number, or a list of one for each model."""
    values: dict[str, Any] = {}
    for axis, value in zip(axes, point, strict=True):
        if axis.model is None:
            values[axis.option] = value
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
