"""What all steps of a recipe share: how they are carried out, and how what is wrong with them is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint, SaveOptions
from ..checkpoint.dtypes import parse_float_dtype
from ..errors import OptionError, RecipeError, nearest


class Strict(BaseModel):
    """A schema that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Execution:
    """How a recipe is carried out; changes no value of the result."""

    save: SaveOptions = field(default_factory=SaveOptions)
    device: str = "cpu"
    out: Path | None = None
    cache: bool = False  # bring what lies on the Hub into the local cache first
    push: str | None = None  # a repository to which the output goes as well
    private: bool = False  # where it has to be created
    folder: Path = Path()  # what the texts of steps are relative to: the recipe's
    engine: Literal["threads", "ray"] = "threads"  # who computes the tensors: this process, or a Ray cluster
    ray_address: str | None = None  # of that cluster; by default RAY_ADDRESS, or one of this machine's processors


def source_of(
    of: str | None, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, operation: str, aside: str | None = None
) -> Checkpoint:
    """What a step works on: the input that it names, or what the step before it made, or the one input there is beside `aside`. Errors: RecipeError."""
    if of:
        return inputs[of]
    if previous is not None:
        return previous
    models = [model for name, model in inputs.items() if name != aside]
    if len(models) == 1:
        return models[0]
    raise RecipeError(f"{operation}: say which input it works on, with `of:`; there are {len(models)}")


def lesson_rows(text: CalibrationOptions, windows: int, model: Checkpoint, how: Execution) -> Tensor:
    """What a step trains on: at least as many windows as it reads, where the text has so many, int64 [windows, window]."""
    return text.model_copy(update={"windows": max(text.windows, windows)}).placed(how.folder).read(model)[0]


def moments_of(text: CalibrationOptions, model: Checkpoint, how: Execution) -> Checkpoint:
    """The moments of the inputs of a model's linear layers on a text."""
    from ..calibration.statistics import calibrate

    text = text.placed(how.folder)
    ids, notes = text.read(model)
    made = calibrate(model, ids, {"seed": text.seed, "sha256": text.digests()}, how.device)
    return replace(made, notes=(*made.notes, *notes))


def with_lesson(made: Checkpoint, steps: int, batch: int, rows: Tensor) -> Checkpoint:
    """The same, with a note on how long it will train."""
    note = f"trains for {steps} steps of {batch} windows of {rows.shape[1]} tokens; {len(rows)} windows of the text are read"
    return replace(made, notes=(*made.notes, note))


def dtype_problems(operation: str, *dtypes: str | None) -> Iterator[str]:
    """What is wrong with these dtypes, a sentence each."""
    for dtype in dtypes:
        try:
            if dtype:
                parse_float_dtype(dtype)
        except OptionError as error:
            yield f"{operation}: {error}"


def schema_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem of a validation as `place: what`, with the nearest known key for an unknown one."""
    found = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"][:-1]))
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            known = _model_at(model, problem["loc"][:-1]).model_fields
            found.append(f"{place + ': ' if place else ''}unknown key '{key}'.{nearest(key, known)}")
        else:
            found.append(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}")
    return list(dict.fromkeys(found))


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The schema that holds at a place: through fields, and through the items of lists and tables."""
    annotation: Any = model
    for part in place:
        known = _model_in(annotation)
        if known is not None and part in known.model_fields:
            annotation = known.model_fields[str(part)].annotation
    return _model_in(annotation) or model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first schema in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)
