"""Carry out the search of a merge step: the same step with the values that were found, and the record of what was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import Checkpoint
from ..checks import read_text
from ..errors import CheckpointError, OptionError
from ..evaluate import load_model, load_tokenizer, tokenize
from ..merge import METHODS
from ..steps import Execution, MergeStep
from .candidates import Candidates
from .objective import nll, pair, prepare, spread
from .optimise import Point, minimise
from .space import values_of

Record = dict[str, Any]


def search(step: MergeStep, inputs: Mapping[str, Checkpoint], folder: Path, how: Execution) -> MergeStep:
    """The step with the best of the option values that were measured, and under `searched` the objective, every evaluation, and held-out losses.

    Texts are relative to `folder`. Deterministic. Errors: OptionError for an impossible search, CheckpointError for models that cannot be measured.
    """
    spec, method = step.search, METHODS[step.method]
    assert spec is not None
    axes = spec.axes(method, step.options(), len(step.models))
    start = values_of(axes, [axis.at(axis.place(axis.start)) for axis in axes])
    candidates = Candidates(step, inputs, how, start)
    tokenizer = load_tokenizer(candidates.checkpoint(start))
    rows, heldout = (
        {name: spread(candidates.at(start), tokenize(tokenizer, read_text(folder / text)), spec.window, spec.windows) for name, text in texts.items()}
        for texts in (spec.texts, spec.heldout)
    )

    def load(name: str) -> Any:
        return load_model(inputs[name]).to(how.device)

    experts = {text: partial(load, model) for text, model in pair(list(spec.texts), list(step.models)).items()}
    objective = prepare(spec.objective, rows, partial(load, step.base) if step.base else None, experts)
    trace: list[Record] = []

    def value(point: Point) -> float:
        options = values_of(axes, point)
        try:
            model = candidates.at(options)
        except OptionError:  # weights that cancel, say: each fits on its own, and the start fitted
            losses = dict.fromkeys(rows, math.inf)
        else:
            losses = objective.losses(model)
        found = objective.value(losses)
        trace.append({"options": options, "objective": _plain(found), "losses": {name: _plain(loss) for name, loss in losses.items()}})
        how.save.progress.advance(1)
        return found

    with how.save.progress.phase(f"searching {', '.join(start)}", spec.budget, " evaluations"):
        seen = minimise(value, axes, spec.budget)
    best = min(seen, key=lambda point: seen[point])
    if not math.isfinite(seen[best]):
        raise CheckpointError(f"search: none of the {len(seen)} merged models has a finite loss")
    options = values_of(axes, best)
    candidates.release()
    record: Record = {
        "objective": spec.objective, "window": next(iter(rows.values())).shape[1], "windows": {name: len(part) for name, part in rows.items()},
        "found": options, "evaluations": trace,
    }  # fmt: skip
    if heldout:
        models = {"base": inputs[step.base]} if step.base else {}
        models |= {"start": step.with_options(start).build(inputs, None, how), "found": step.with_options(options).build(inputs, None, how)}
        record["heldout"] = [_losses(name, model, heldout, how) for name, model in models.items()]
    return step.with_options(options).model_copy(update={"search": None, "searched": record})


def _losses(name: str, checkpoint: Checkpoint, rows: Mapping[str, Tensor], how: Execution) -> Record:
    model = load_model(checkpoint).to(how.device)
    losses = {text: nll(model, part) for text, part in rows.items()}
    return {"model": name, "losses": {text: _plain(loss) for text, loss in losses.items()}, "mean": _plain(math.fsum(losses.values()) / len(losses))}


def _plain(value: float) -> float | None:
    """As a recipe holds it: six digits after the point, nothing for what is not finite."""
    return round(value, 6) if math.isfinite(value) else None
