"""The operations that a recipe composes: their YAML keys, what is wrong with them, and the checkpoint that each makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prune.fold.plan_file import read as read_plan
from quant.bits_file import read as read_allocation

from ..calibration.options import CalibrationOptions
from ..errors import CompressError, nearest
from .adapters import DeltaStep, ExtractAdapterStep, MergeAdaptersStep, QuantizeAdapterStep, TrainAdapterStep
from .base import Execution, Strict, schema_problems, source_of
from .folding import ExportFoldStep, FoldStep
from .merging import MergekitStep, MergeStep, MoeStep
from .pruning import PruneStep, RetrainStep
from .quantizing import CalibrateStep, ConvertStep, DequantizeStep, QuantizeStep

__all__ = [
    "OPERATIONS", "TEXT_KEYS", "Execution", "FoldStep", "MergeStep", "PruneStep", "StepOptions", "Strict", "calibrations", "order_problems", "parse_step",
    "parse_steps", "schema_problems", "source_of", "with_files",
]  # fmt: skip

StepOptions = (
    MergeStep
    | MergekitStep
    | MoeStep
    | MergeAdaptersStep
    | ExtractAdapterStep
    | QuantizeAdapterStep
    | TrainAdapterStep
    | DeltaStep
    | QuantizeStep
    | CalibrateStep
    | DequantizeStep
    | ConvertStep
    | PruneStep
    | FoldStep
    | RetrainStep
    | ExportFoldStep
)
OPERATIONS: dict[str, type[StepOptions]] = {
    "merge": MergeStep,
    "mergekit": MergekitStep,
    "moe": MoeStep,
    "merge_adapters": MergeAdaptersStep,
    "extract_adapter": ExtractAdapterStep,
    "quantize_adapter": QuantizeAdapterStep,
    "train_adapter": TrainAdapterStep,
    "delta": DeltaStep,
    "quantize": QuantizeStep,
    "calibrate": CalibrateStep,
    "dequantize": DequantizeStep,
    "convert": ConvertStep,
    "prune": PruneStep,
    "fold": FoldStep,
    "retrain": RetrainStep,
    "export_fold": ExportFoldStep,
}
TEXT_KEYS = ("calibration", "text")  # of steps, as the flags of commands: what methods look at; what trains, or is measured on
# Keys that may name a file, how it is read, and what stands for one that cannot be.
FILES: dict[tuple[str, str], tuple[Callable[[Path], Any], Any]] = {
    ("quantize", "allocation"): (lambda path: [group.model_dump() for group in read_allocation(path)], []),
    ("fold", "plan"): (lambda path: read_plan(path).model_dump(), {"blocks": 1, "kept": [0], "groups": [0], "parents": [0]}),
}
FIRST = (MergeStep, MergekitStep, MoeStep, ExtractAdapterStep, TrainAdapterStep, DeltaStep)  # they read inputs, not what a step before them made


def parse_step(step: object) -> dict[str, StepOptions]:
    if not isinstance(step, dict) or len(step) != 1:
        raise ValueError(f"a step is one operation with its options, as in `merge: {{...}}`, not {step!r}")
    (name, options), = step.items()
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation '{name}'.{nearest(str(name), OPERATIONS)}")
    return {name: options if isinstance(options, StepOptions) else OPERATIONS[name].model_validate(options or {})}


def parse_steps(steps: Sequence[object]) -> tuple[list[dict[str, StepOptions]], list[str]]:
    """The steps that can be read, and a sentence for each problem of the others."""
    parsed, found = [], []
    for number, step in enumerate(steps, 1):
        try:
            parsed.append(parse_step(step))
        except ValidationError as error:
            assert isinstance(step, dict)
            name = next(iter(step))
            found += [f"step {number}, {name}: {problem}" for problem in schema_problems(error, OPERATIONS[name])]
        except ValueError as error:
            found.append(f"step {number}: {error}")
    return parsed, found


def with_files(steps: Sequence[object], folder: Path) -> tuple[list[object], list[str]]:
    """Steps whose allocation or plan is a file, relative to `folder`, with what the file holds in its place; and a sentence for each that cannot be read."""
    done, found = list(steps), []
    for number, step in enumerate(steps, 1):
        for (name, key), (read, nothing) in FILES.items():
            options = step.get(name) if isinstance(step, dict) else None
            if isinstance(options, dict) and isinstance(options.get(key), str):
                try:
                    content = read(folder / Path(options[key]).expanduser())
                except CompressError as error:
                    found.append(f"step {number}, {name}: {key}: {error}")
                    content = nothing
                done[number - 1] = {name: {**options, key: content}}
    return done, found


def calibrations(steps: Sequence[Mapping[str, StepOptions]]) -> list[tuple[str, CalibrationOptions]]:
    """The texts that steps read, each with the name of its operation and of its key."""
    found = [(f"{name}: {key}", getattr(options, key, None)) for step in steps for name, options in step.items() for key in TEXT_KEYS]
    return [(name, text) for name, text in found if isinstance(text, CalibrationOptions)]


def order_problems(steps: Sequence[Mapping[str, StepOptions]], inputs: Mapping[str, object]) -> list[str]:
    """What is wrong with how steps follow each other."""
    found: list[str] = []
    for number, step in enumerate(steps, 1):
        for name, options in step.items():
            source = None if isinstance(options, FIRST) else options.of
            models = [name for name in inputs if name != getattr(options, "moments", None)]
            if number > 1 and (source is not None or isinstance(options, FIRST)):
                lost = f"what step {number - 1} makes would be lost"
                found.append(f"step {number}, {name}: it reads inputs, not the step before it, so that {lost}; make it the first, or a recipe of its own")
            elif number == 1 and source is None and len(models) > 1 and not isinstance(options, FIRST):
                found.append(f"step 1, {name}: say which input it works on, with `of:`; there are {', '.join(models)}")
            after = [later for step in steps[number:] for later in step.values()]
            if isinstance(options, FoldStep) and options.compact and not all(isinstance(later, RetrainStep | ExportFoldStep) for later in after):
                found.append(f"step {number}, {name}: compact says how the output is stored; retrain, which keeps it so, and export_fold may follow alone")
    return found
