"""From one packed format to another: codes and zero points are carried bit for bit, and scales as the target's dtype holds them. Nothing is quantised again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.checkpoint.dtypes import TAGS, TORCH_DTYPES, parse_float_dtype
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.model import describe

from . import FORMATS
from .formats import Format, Module, modules_of
from .plan import constant, dense_modules, with_quantization
from .validate import refuse


def convert(checkpoint: Checkpoint, to: str) -> Checkpoint:
    """The packed checkpoint in another format. Notes say what its scales lose, and whether servers will round activations otherwise than before.

    Errors: OptionError where the format cannot hold the schemes; CheckpointError where nothing is packed, or in a way that cannot be read.
    """
    layout = FORMATS[to]
    modules = list(modules_of(checkpoint))
    if not modules:
        raise CheckpointError(f"{checkpoint.label} holds no packed weights to convert; `compress quantize` makes some")
    if to == "dense":
        raise OptionError("--to dense: `compress dequantize` unpacks a model")
    if all(module.stored.layout == to for module in modules):
        raise OptionError(f"{checkpoint.label} is stored as {to} already")
    for module in modules:
        if reason := layout.refuses(module.stored.scheme):
            raise OptionError(f"{checkpoint.label}: {module.name} cannot be stored as {to}: {reason}")
    steps: list[Step] = []
    taken: set[str] = set()
    changes = _Changes()
    for module in modules:
        dtype = _scale_dtype(checkpoint, layout, module)
        changes.look(checkpoint, module, dtype)
        weight = TensorSpec(f"{module.name}.weight", TAGS[dtype], module.shape)
        fixed = {f"{module.name}.{part}": value for part, value in layout.fixed(weight).items()}
        writes = layout.specs(weight, module.stored.scheme)
        rows = tuple(write for write in writes if write.name not in fixed)
        units = module.reader.row_unit(module.stored.scheme), layout.row_unit(module.stored.scheme)
        reads = tuple((checkpoint, f"{module.name}.{part}") for part in module.row_parts)
        steps.append(Step(reads, rows, _Convert(checkpoint.label, module, layout, dtype), lcm(*units) if all(units) else 0))
        steps += [constant(write, fixed[write.name]) for write in writes if write.name in fixed]
        taken.update(module.tensors)
    steps += [copy_step(checkpoint, name) for name in checkpoint.specs if name not in taken]
    notes = [*changes.notes(), *_about_activations(modules, to)]
    result = Checkpoint(f"{checkpoint.label} as {to}", Plan(steps), checkpoint.files, (*checkpoint.notes, *notes))
    dense = dense_modules(checkpoint, describe(checkpoint), taken, checkpoint.specs)
    return refuse(with_quantization(result, layout, layout.config({module.name: module.stored.scheme for module in modules}, dense)))


class _Convert:
    """Decode rows of one weight and encode them anew."""

    def __init__(self, label: str, module: Module, layout: Format, dtype: torch.dtype) -> None:
        self.label, self.module, self.layout, self.dtype = label, module, layout, dtype

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        named = dict(zip(self.module.row_parts, tensors, strict=True))
        try:
            codes = self.module.decode(named)
        except CheckpointError as error:
            raise CheckpointError(f"{self.label}: {self.module.name}: {error}") from None
        scale = codes.scale.to(self.dtype)
        if bool(scale.isinf().any()):
            raise CheckpointError(f"{self.label}: {self.module.name} has a scale that {TAGS[self.dtype]} cannot hold, in which {self.layout.name} stores them")
        return list(self.layout.encode(replace(codes, scale=scale)).values())


def _scale_dtype(checkpoint: Checkpoint, layout: Format, module: Module) -> torch.dtype:
    """The format's own; else that of the model, in which servers hold them; else the one they have."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return layout.dtype or TORCH_DTYPES[parse_float_dtype(named) if isinstance(named, str) and named != "auto" else module.specs[module.scale].dtype]


class _Changes:
    """What scales lose in another dtype; only the scales of stored checkpoints are looked at, for others would have to be computed."""

    def __init__(self) -> None:
        self.largest, self.small, self.unseen, self.dtype = 0.0, 0, False, torch.float32

    def look(self, checkpoint: Checkpoint, module: Module, dtype: torch.dtype) -> None:
        if torch.promote_types(TORCH_DTYPES[module.specs[module.scale].dtype], dtype) == dtype:
            return  # which holds all of them
        self.dtype = dtype
        if isinstance(checkpoint.source, Plan):
            self.unseen = True
            return
        scale = checkpoint.read(f"{module.name}.{module.scale}").double()
        change = (scale.to(dtype).double() - scale).abs()
        normal = scale.abs() >= torch.finfo(dtype).tiny
        self.largest = max(self.largest, float((change / scale.abs())[normal].amax()) if bool(normal.any()) else 0.0)
        self.small += int((change > 0)[~normal].sum())

    def notes(self) -> list[str]:
        name = str(self.dtype).removeprefix("torch.")
        if self.unseen:
            return [f"scales are rounded to {name}, by at most {torch.finfo(self.dtype).eps / 2:.2g} of their size where {name} has normal numbers"]
        tiny = torch.finfo(self.dtype).tiny
        below = [f"{self.small} scales below {tiny:.2g} are rounded to multiples of {tiny * torch.finfo(self.dtype).eps:.2g}"] if self.small else []
        return ([f"scales are rounded to {name}; the largest relative change is {self.largest:.2g}"] if self.largest else []) + below


def _about_activations(modules: Sequence[Module], to: str) -> list[str]:
    """A note where servers will round activations and did not, or the other way round."""
    before, after = any(module.stored.activations for module in modules), to in ("int-quantized", "float-quantized")
    if before == after:
        return []
    return [f"servers will round activations to 8 bits as they run {to}" if after else f"{to} rounds weights only: servers will no longer round activations"]
