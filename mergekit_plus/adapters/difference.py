"""A base with the difference of a fine-tune added: what packed differences (`compress adapter delta`) stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.folder import DELTA_QUANT
from ..checkpoint.spec import natural_order
from ..errors import CheckpointError
from ..model import adapter_reason, quantized_reason, tied_alias
from .peft import refuse_misfits
from .product import working_dtype


def is_difference(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the difference of a fine-tune, and no model."""
    return DELTA_QUANT in checkpoint.files


def add_difference(base: Checkpoint, difference: Checkpoint) -> Checkpoint:
    """The base with a difference added where it holds one, in float32 and rounded once, and its other tensors in place of the base's.

    Errors: CheckpointError where the base lacks a tensor of it, or has another shape.
    """
    if reason := quantized_reason(base) or adapter_reason(base):
        raise CheckpointError(reason)
    said = difference.json_file(DELTA_QUANT)
    problems, steps = [], {}
    for name, spec in difference.specs.items():
        place = name if name in base.specs else tied_alias(base, name)
        if place is None:
            problems.append(f"the base has no '{name}'")
        elif base.specs[place].shape != spec.shape:
            problems.append(f"{name} is {spec.shape} in the difference and {base.specs[place].shape} in the base")
        else:
            steps[name] = _added(base, place, difference, spec) if name in said["tensors"] else copy_step(difference, name)
    advice = f"Give the base that it was made with{f' ({hint})' if isinstance(hint := said.get('base'), str) else ''}"
    refuse_misfits(f"{difference.label} does not fit {base.label}", problems, advice)
    names = sorted({*base.specs, *steps}, key=natural_order)
    plan = Plan(steps[name] if name in steps else copy_step(base, name) for name in names)
    return Checkpoint(f"{base.label}+{difference.label}", plan, base.files, (*base.notes, *difference.notes))


def _added(base: Checkpoint, place: str, difference: Checkpoint, spec: TensorSpec) -> Step:
    write = replace(base.specs[place], name=spec.name)

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        work = working_dtype(tensors[0].dtype)
        return ((tensors[0].to(work) + tensors[1].to(work)).to(TORCH_DTYPES[write.dtype]),)

    return Step(((base, place), (difference, spec.name)), (write,), run)
