"""A base with adapters applied: a checkpoint like any other, computed as it is read.

Each tensor that an adapter changes is one step (a chain of steps for several adapters, in float32 between them), in rows; the result is
rounded once, to the base's dtype. An adapter that changes one of two tied tensors unties them: that is what it did when it was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from ..checkpoint.dtypes import TAGS, TORCH_DTYPES
from ..checkpoint.plan import Take, row_multiple
from ..checkpoint.references import split_reference
from ..checkpoint.spec import natural_order
from ..errors import CheckpointError, nearest
from ..model import ModelMap, adapter_reason, describe, quantized_reason, tied_alias
from .difference import add_difference, is_difference
from .neurons import is_neurons, widened
from .peft import Adapter, LowRank, read_adapter, refuse_misfits
from .product import block_rows, blocks, working_dtype

Change = Callable[[Checkpoint, TensorSpec, TensorSpec], Step]  # a checkpoint, a tensor of it, and what is to be written


def open_adapted(ref: str, cache: bool = False) -> Checkpoint:
    """Open `model+adapter+adapter`: the base with these adapters (LoRA, neurons), or packed differences of fine-tunes, applied in this order.

    Errors: CheckpointError where one of them cannot be opened, or where they do not fit together.
    """
    opened, *changes = (Checkpoint.open(part, cache) for part in split_reference(ref))
    pins, result = [part.pinned for part in (opened, *changes)], opened
    for add, run in groupby(changes, _way_of):
        same = list(run)
        result = reduce(add, same, result) if add else apply(result, [read_adapter(part) for part in same])  # LoRAs that follow each other, together
    return replace(result, pinned="+".join(pins) if all(pins) else "")


def _way_of(change: Checkpoint) -> Callable[[Checkpoint, Checkpoint], Checkpoint] | None:
    """How something that is no LoRA is applied."""
    return add_difference if is_difference(change) else widened if is_neurons(change) else None


def apply(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base with adapters applied one after the other, as peft's `merge_and_unload` does it.

    Errors: CheckpointError where an adapter names what the base does not have, or has another shape than the base.
    """
    if reason := quantized_reason(base) or adapter_reason(base):
        raise CheckpointError(reason)
    names = _Names(base)
    chains: dict[str, list[Change]] = {}
    tied_values: dict[str, Change] = {}  # what peft loads into the base itself, and so into all that is tied to it
    for adapter in adapters:
        problems: list[str] = []
        changed: dict[str, list[Change]] = {}
        for name, change, of_base in _changes(adapter, names, chains, problems):
            changed.setdefault(name, []).append(change)
            if of_base:
                tied_values[name] = change
        for name, found in changed.items():
            chains.setdefault(name, []).extend(found)
        hint = adapter.config.get("base_model_name_or_path")
        refuse_misfits(
            f"{adapter.label} does not fit {base.label}", problems,
            f"Give the base that it was trained on{f' ({hint})' if isinstance(hint, str) and hint else ''}",
        )  # fmt: skip
    untied = {alias: [tied_values[source]] if source in tied_values else [] for alias, source in names.untied(chains).items()}
    steps = [_chained(base, names, name, (untied | chains).get(name, [])) for name in sorted({*base.specs, *chains, *untied}, key=natural_order)]
    notes = tuple(note for adapter in adapters for note in adapter.checkpoint.notes)
    label = "+".join([base.label, *(adapter.label for adapter in adapters)])
    result = Checkpoint(label, Plan(steps), base.files, (*base.notes, *notes))
    return result.with_config(tie_word_embeddings=False) if names.is_untied(chains) else result


def targets(base: Checkpoint, adapter: Adapter) -> dict[str, LowRank]:
    """The tensor of the base that each product of an adapter is added to."""
    names = _Names(base)
    return {names.written(f"{module}.weight"): lowrank for module, lowrank in adapter.lowrank.items()}


class _Names:
    """What parameters of the transformers model are called in a checkpoint. transformers is asked only where names do not say it."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base

    @cached_property
    def meanings(self) -> ModelMap:
        return describe(self.base)

    @cached_property
    def by_parameter(self) -> dict[str, str]:
        return {parameter: name for name, parameter in self.meanings.parameters.items()}

    def stored(self, parameter: str) -> str | None:
        """The tensor that holds a parameter under its own name or another's, None where there is none."""
        if parameter in self.base.specs:
            return parameter
        return tied_alias(self.base, parameter) or (self.by_parameter.get(parameter) if self.base.config else None)

    def written(self, parameter: str) -> str:
        """Under which name a parameter that is changed is written: a tied one, which is not stored, under its own."""
        stored = self.stored(parameter)
        return parameter if stored is None or tied_alias(self.base, parameter) else stored

    def transposed(self, parameter: str) -> bool:
        """Whether a square weight of a model with Conv1D layers is one of these."""
        name = self.stored(parameter)
        return not self.base.config or (name is not None and self.meanings.tensors[name].transposed)

    def _tied(self, changed: Collection[str]) -> list[tuple[str, ...]]:
        """The groups of tied tensors that a change reaches. What stands in a block is never tied."""
        outside = any(not re.search(r"\.\d+\.", name) for name in changed)
        if not outside or not self.base.config or self.base.config.get("tie_word_embeddings") is False:
            return []
        return [group for group in self.meanings.tied if any(name in changed for name in group)]

    def is_untied(self, changed: Collection[str]) -> bool:
        """Whether these changes untie what the base ties."""
        return bool(self._tied(changed))

    def untied(self, changed: Collection[str]) -> dict[str, str]:
        """The tensors that must now be written, though the base does not store them, and where the base has their values.

        Errors: CheckpointError for what cannot be untied: an encoder's and a decoder's embeddings.
        """
        found: dict[str, str] = {}
        for source, *aliases in self._tied(changed):
            for alias in aliases:
                if alias not in self.base.specs and tied_alias(self.base, alias) != source:
                    raise CheckpointError(f"{self.base.label}: {alias} and {source} are one tensor, of which an adapter changes one; apply it with peft")
                if alias not in self.base.specs:
                    found[alias] = source
        return found


def _changes(adapter: Adapter, names: _Names, before: Collection[str], problems: list[str]) -> Iterator[tuple[str, Change, bool]]:
    """Each tensor of the base that an adapter changes, how, and whether the new value is the base's own; what does not fit goes to `problems`."""
    specs = names.base.specs
    for parameter, tensor in adapter.whole.items():
        stored, shape = names.stored(parameter), adapter.checkpoint.specs[tensor].shape
        if stored is None:
            problems.append(f"the base has no '{parameter}' to put {tensor} in")
        elif specs[stored].shape != shape:
            problems.append(f"{parameter} is {shape} in the adapter and {specs[stored].shape} in the base")
        else:
            yield names.written(parameter), _replaced(adapter.checkpoint, tensor), ".base_layer." in tensor
    for module, lowrank in adapter.lowrank.items():
        weight = f"{module}.weight"
        stored = names.stored(weight)
        if stored is None:
            problems.append(f"the base has no '{weight}'.{nearest(weight, specs) if len(specs) < 1000 else ''}")
            continue
        turned = _is_turned(adapter, lowrank, specs[stored].shape, names)
        if turned is None:
            problems.append(f"{module}: {_shape_of(adapter, lowrank)} in the adapter, {specs[stored].shape} in the base")
            continue
        if lowrank.magnitude and adapter.checkpoint.specs[lowrank.magnitude].numel != adapter.checkpoint.specs[lowrank.b].rows:
            problems.append(f"{lowrank.magnitude} has {adapter.checkpoint.specs[lowrank.magnitude].shape}, not one length for each output")
            continue
        if lowrank.magnitude and names.written(weight) in before:
            problems.append(f"{module} is a DoRA layer, whose lengths are those of the base alone; name this adapter before the others")
            continue
        yield names.written(weight), _added(adapter.checkpoint, lowrank, turned), False
        if lowrank.bias:
            bias = names.stored(f"{module}.bias")
            if bias is None or specs[bias].shape != adapter.checkpoint.specs[lowrank.bias].shape:
                problems.append(f"{lowrank.bias} needs a bias of {module} to go to, of its shape")
                continue
            yield bias, _shifted(adapter.checkpoint, lowrank.bias, lowrank.scale), False


def _shape_of(adapter: Adapter, lowrank: LowRank) -> tuple[int, ...]:
    """The shape of the weight that an adapter changes, as it would be stored."""
    a, b = adapter.checkpoint.specs[lowrank.a].shape, adapter.checkpoint.specs[lowrank.b].shape
    return (a[1], b[0]) if lowrank.embedding else (b[0], *a[1:])


def _is_turned(adapter: Adapter, lowrank: LowRank, shape: tuple[int, ...], names: _Names) -> bool | None:
    """Whether the base stores the weight as the transpose of `B A`; None where it has another shape."""
    wanted = _shape_of(adapter, lowrank)
    if lowrank.embedding:
        return True if wanted == shape else None
    may_turn = bool(adapter.config.get("fan_in_fan_out")) and wanted[::-1] == shape and len(shape) == 2
    if wanted == shape:
        return may_turn and names.transposed(f"{lowrank.module}.weight")
    return True if may_turn else None


def _chained(base: Checkpoint, names: _Names, name: str, chain: Sequence[Change]) -> Step:
    """The step that writes a tensor: changed, or untouched."""
    stored = names.stored(name)
    assert stored is not None
    part, source = base, base.specs[stored]
    if not chain:
        return copy_step(base, stored, name)
    between = TAGS[working_dtype(TORCH_DTYPES[source.dtype])] if source.is_float else source.dtype
    for change in chain[:-1]:
        spec = TensorSpec(stored, between, source.shape)
        part = Checkpoint(base.label, Plan([change(part, part.specs[stored], spec)]))
    return chain[-1](part, part.specs[stored], replace(source, name=name))


def _replaced(adapter: Checkpoint, tensor: str) -> Change:
    """The adapter's own tensor in place of the base's."""

    def step(part: Checkpoint, spec: TensorSpec, write: TensorSpec) -> Step:
        def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
            return (tensors[0].to(TORCH_DTYPES[write.dtype]),)

        return Step(((adapter, tensor),), (write,), run, row_multiple(write))

    return step


def _shifted(adapter: Checkpoint, tensor: str, scale: float) -> Change:
    """The base's vector plus a scaled one."""

    def step(part: Checkpoint, spec: TensorSpec, write: TensorSpec) -> Step:
        def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
            vector, shift = (tensor.to(working_dtype(tensors[0].dtype)) for tensor in tensors)
            return ((vector + scale * shift).to(TORCH_DTYPES[write.dtype]),)

        return Step(((part, spec.name), (adapter, tensor)), (write,), run, row_multiple(write))

    return step


def _added(adapter: Checkpoint, lowrank: LowRank, turned: bool) -> Change:
    """The base's weight W plus `scale * B A`, or plus its transpose."""

    def step(part: Checkpoint, spec: TensorSpec, write: TensorSpec) -> Step:
        reads = [(part, spec.name), (adapter, lowrank.b), (adapter, lowrank.a), *([(adapter, lowrank.magnitude)] if lowrank.magnitude else [])]
        cut = 1 if turned else 2  # reads that come in rows
        takes: list[Take] = [None if index < cut else "whole" for index in range(len(reads))]
        columns = turned and lowrank.magnitude is not None  # lengths of columns: of the whole tensor, then
        multiple = 0 if columns else block_rows(prod(spec.shape[1:]))
        return Step(tuple(reads), (write,), _Add(lowrank.scale, turned, TORCH_DTYPES[write.dtype]), multiple, takes=tuple(takes))

    return step


class _Add:
    """Rows of `W + scale * B A`; with DoRA, each output's row of it brought to its length."""

    def __init__(self, scale: float, turned: bool, dtype: torch.dtype) -> None:
        self.scale, self.turned, self.dtype = scale, turned, dtype

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        work = working_dtype(tensors[0].dtype)
        weight, (b, a, *magnitude) = tensors[0].flatten(1), (tensor.to(work).flatten(1) if tensor.dim() > 1 else tensor.to(work) for tensor in tensors[1:])
        if self.turned:  # W [in, out] += scale * A^T B^T
            b, a = a.T[first_row : first_row + len(weight)], b.T
        lengths = magnitude[0].flatten() if magnitude else None

        def added(rows: slice) -> Tensor:
            return weight[rows].to(work) + (b[rows] @ a).mul_(self.scale)

        with torch.no_grad():
            result = torch.empty(weight.shape, dtype=self.dtype)
            factors = None
            if lengths is not None and self.turned:
                squares = sum((added(rows).double().square().sum(0) for rows in blocks(*weight.shape)), torch.zeros(weight.shape[1], dtype=torch.float64))
                factors = (lengths / squares.sqrt()).to(work)
            for rows in blocks(*weight.shape):
                block = added(rows)
                if factors is not None:
                    block *= factors
                elif lengths is not None:
                    block *= (lengths[first_row + rows.start : first_row + rows.stop] / torch.linalg.vector_norm(block, dim=1))[:, None]
                result[rows] = block
        return (result.view(tensors[0].shape),)
