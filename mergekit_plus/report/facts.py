"""What a report tells, as data: read from the output, its recipe and its results, and measured on the weights where that is worth a look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune.report import zeros_of
from quant.allocate import solve
from quant.layer_groups import stored_bits, weights_of
from quant.plan import dequantize, is_packed
from quant.sensitivity import Sensitivities

from ..checkpoint import Checkpoint
from ..checkpoint.layout import MANIFEST
from ..checks import Row
from ..diff import diff
from ..errors import CheckpointError, CompressError
from ..inspection import stored_bytes
from ..model import describe, layer_of
from ..progress import Progress, quiet
from ..provenance import RECIPE, RESULTS
from ..recipe import Built, Recipe, build, load
from ..safe_yaml import read
from ..steps import FIRST, MergeStep
from .overlap import Overlap, overlaps

POINTS = 24  # of the frontier

Grid = dict[str, dict[int, float]]  # a value for each kind of layer and each block


@dataclass(frozen=True)
class Spent:
    """What a run took: seconds of the clock, and the most memory that the process had, file pages among it."""

    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Facts:
    """What there is to tell of an output.

    sizes: bytes of each input, after each step, and as it lies on the disk. grids: of the linear layers, the bits that a weight takes, the share of
    zeros, and how far they are from `reference`, ||W - W0|| / ||W0||. overlaps: of the first merge, how alike the changes of its models are. frontier: (bits a
    weight, predicted loss) of the best allocations, where sensitivities were given; sensitivity: what each layer costs at the fewest bits. notes: what
    could not be told, and why.
    """

    name: str
    operations: tuple[str, ...]
    inputs: tuple[tuple[str, str, int], ...]
    outputs: Mapping[str, Mapping[str, Any]]
    sizes: tuple[tuple[str, int], ...]
    recipe: str
    table: tuple[Row, ...]
    checks: tuple[Mapping[str, Any], ...]
    sampled: tuple[Mapping[str, str], ...]
    grids: Mapping[str, Grid]
    reference: str
    overlaps: tuple[Overlap, ...] = ()
    frontier: tuple[tuple[float, float], ...] = ()
    sensitivity: Grid = field(default_factory=dict)
    unit: str = ""
    spent: Spent | None = None
    notes: tuple[str, ...] = ()


def gather(out: Path, spent: Spent | None = None, sensitivities: Path | None = None, progress: Progress | None = None) -> Facts:
    """Read and measure what a report of an output folder tells. Weights are read once, those of its inputs too where they are still there.

    sensitivities: a file of `compress allocate --sensitivities`. Errors: CheckpointError for what is no output of this program; OptionError for a file that
    is none of that kind.
    """
    progress = progress or quiet()
    if not (out / MANIFEST).is_file():
        raise CheckpointError(f"{out} has no {MANIFEST}: a report is of a folder that `compress` wrote")
    manifest = json.loads((out / MANIFEST).read_bytes())
    results = json.loads((out / RESULTS).read_bytes()) if (out / RESULTS).is_file() else {}
    result = Checkpoint.open(out)
    operations = tuple(name for step in read(out / RECIPE).get("steps", ()) for name in step)
    recipe, built, notes = _rebuilt(out / RECIPE)
    with progress.phase("reading weights", None):
        reference, label = _reference(built, recipe) if built and recipe else (None, "")
        grids = _grids(result, reference, "prune" in operations)
        found = _overlaps(built, recipe) if built and recipe else ()
    table = Sensitivities.read(sensitivities) if sensitivities else None
    return Facts(
        name=out.resolve().name,
        operations=operations,
        inputs=tuple((name, recipe.inputs[name].ref, stored_bytes(model)) for name, model in built.inputs.items()) if built and recipe else (),
        outputs=manifest["outputs"],
        sizes=_sizes(built, result),
        recipe=(out / RECIPE).read_text(encoding="utf-8"),
        table=tuple(results.get("measured", ())),
        checks=tuple(results.get("checks", ())),
        sampled=tuple(results.get("sampled", ())),
        grids=grids,
        reference=label,
        overlaps=found,
        frontier=_frontier(table, dequantize(result) if is_packed(result) else result) if table else (),
        sensitivity=_sensitivity(table) if table else {},
        unit=str(table.made.get("sensitivity", "")) if table else "",
        spent=spent,
        notes=(*result.notes, *notes),
    )


def _rebuilt(path: Path) -> tuple[Recipe | None, Built | None, list[str]]:
    """The recipe put together again from its inputs' headers; nothing where they, or the texts that it names, are not there any more."""
    try:
        recipe = load(path)
        return recipe, build(recipe), []
    except CompressError as error:
        return None, None, [f"sizes on the way, errors and overlaps are not told: {error}"]


def _sizes(built: Built | None, result: Checkpoint) -> tuple[tuple[str, int], ...]:
    inputs = [(name, stored_bytes(model)) for name, model in built.inputs.items()] if built else []
    stages = [(name, model.nbytes) for name, model in built.stages.items()] if built else []
    return (*inputs, *stages, ("output", stored_bytes(result)))


def _grids(result: Checkpoint, reference: Checkpoint | None, pruned: bool) -> dict[str, Grid]:
    """Bits, zeros where some were made, and errors of the linear layers."""
    dense = dequantize(result) if is_packed(result) else result
    linears = {name: name.rpartition(".")[0] + "." for name in describe(dense).linears if layer_of(name)}
    if not linears:
        return {}
    stored = {name: sum(spec.nbytes for own, spec in result.specs.items() if own.startswith(prefix)) for name, prefix in linears.items()}
    grids = {"bits": _grid({name: 8 * stored[name] / dense.specs[name].numel for name in linears})}
    if pruned:
        grids["zeros"] = _grid({name: zero / count for name, (zero, count) in zeros_of(dense).items() if name in linears})
    if reference is not None:
        found = {tensor.name: tensor.relative for tensor in diff(reference, dense).tensors if tensor.name in linears}
        if any(found.values()):
            grids["error"] = _grid(found)
    return grids


def _reference(built: Built, recipe: Recipe) -> tuple[Checkpoint | None, str]:
    """What the output is an approximation of: what its merge made, or its only input."""
    if not recipe.steps:
        return None, ""
    first = next(iter(recipe.steps[0].values()))
    if isinstance(first, FIRST):
        label, stage = next(iter(built.stages.items()), ("", None))
        return stage, label.removeprefix("after ")
    name = recipe.checks.against or getattr(first, "of", None) or next(iter(built.inputs))
    model = built.inputs[name]
    return (dequantize(model) if is_packed(model) else model), name


def _overlaps(built: Built, recipe: Recipe) -> tuple[Overlap, ...]:
    """Of the merge over a base, if there is one, how alike the changes of its models are."""
    merge = next((options for step in recipe.steps for options in step.values() if isinstance(options, MergeStep) and options.base), None)
    if merge is None:
        return ()
    assert merge.base is not None
    try:
        return overlaps(built.inputs[merge.base], {name: built.inputs[name] for name in merge.models})
    except CompressError:  # adapters, or packed weights: nothing to compare element by element
        return ()


def _grid(values: Mapping[str, float]) -> Grid:
    """Values of weights by kind of layer and block; of several in one cell (experts) the mean."""
    cells: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        stack, block = layer_of(name) or ("", 0)
        kind = name.removeprefix(f"{stack}.{block}.").removesuffix(".weight")
        kind = ".".join("*" if part.isdigit() else part for part in kind.split("."))
        cells.setdefault(kind, {}).setdefault(block, []).append(value)
    return {kind: {block: sum(found) / len(found) for block, found in row.items()} for kind, row in cells.items()}


def _sensitivity(table: Sensitivities) -> Grid:
    """What each group costs where it alone has the fewest bits: the loss there less that at the most."""
    ends = sorted(range(len(table.choices)), key=lambda choice: table.choices[choice].bits)
    cost = {group[0]: row[ends[0]] - row[ends[-1]] for group, row in zip(table.groups, table.losses, strict=True)}
    return _grid(cost)


def _frontier(table: Sensitivities, dense: Checkpoint) -> tuple[tuple[float, float], ...]:
    """(stored bits a quantised weight, predicted loss) of the best allocation for each of `POINTS` budgets, from the fewest bits to the most."""
    costs, weights = stored_bits(dense, table.groups, table.choices, "pack-quantized"), weights_of(dense, table.groups)
    low, high = (sum(end(row) for row in costs) for end in (min, max))
    budgets = [low + (high - low) * point // (POINTS - 1) for point in range(POINTS)]
    best = [solve(table.losses, costs, budget) for budget in budgets]
    return tuple((found.cost / weights, table.predicted(found.choices)) for found in best)
