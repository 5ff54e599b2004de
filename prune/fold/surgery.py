"""Depth surgery: a checkpoint with some of its blocks, groups of which share their linear weights; written out as an ordinary model.

Norms stay private: each block that is kept has those of the block that it was (WideNet, arXiv 2107.11817). What shares is every linear weight of a block,
and its bias. What config.json says of layers one by one (windows, kinds of attention) goes with the block that it was said of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mergekit_plus.adapters.product import working_dtype
from mergekit_plus.checkpoint import Checkpoint, Plan, Step, copy_step
from mergekit_plus.checkpoint.folder import COMPACT
from mergekit_plus.checkpoint.plan import row_multiple
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.layers import Part, of_layers, parts_of
from mergekit_plus.model import adapter_reason, describe, quantized_reason


@dataclass(frozen=True)
class Fold:
    """What becomes of a model's blocks.

    kept: for each block of the result the block that it was. groups: for each block of the result the number of its group, from 0; those of a group
    have one set of linear weights. parents: for each group the block, of the original, whose weights these are, or None for the mean of its members.
    """

    kept: tuple[int, ...]
    groups: tuple[int, ...]
    parents: tuple[int | None, ...]

    @classmethod
    def of(cls, kept: Sequence[int]) -> Fold:
        """These blocks stay, and none shares; `mapped` says which do."""
        return cls(tuple(kept), tuple(range(len(kept))), tuple(kept))

    def members(self, group: int) -> tuple[int, ...]:
        """The blocks of the original in a group."""
        return tuple(block for block, its in zip(self.kept, self.groups, strict=True) if its == group)

    def first(self, place: int) -> int:
        """The first block of the result in the group of one."""
        return self.groups.index(self.groups[place])

    def sources(self, place: int) -> tuple[int, ...]:
        """The blocks of the original whose mean the linear weights of a block of the result are."""
        group = self.groups[place]
        parent = self.parents[group]
        return self.members(group) if parent is None else (parent,)

    def problems(self, blocks: int) -> Iterator[str]:
        """What is wrong with it for a model of so many blocks, a sentence each."""
        if not self.kept or any(not 0 <= block < blocks for block in self.kept):
            yield f"the model has the blocks 0 to {blocks - 1}; {list(self.kept)} are to be kept"
        elif len(self.groups) != len(self.kept) or sorted(set(self.groups)) != list(range(len(self.parents))):
            yield f"each of the {len(self.kept)} blocks has a group, 0 to {len(self.parents) - 1}, not {list(self.groups)}"
        elif any(parent is not None and not 0 <= parent < blocks for parent in self.parents):
            yield f"the model has the blocks 0 to {blocks - 1}; {list(self.parents)} are to be parents"


def stack_of(checkpoint: Checkpoint) -> Part:
    """The blocks of a model that can be folded. Errors: CheckpointError for what is quantised, compact, an adapter, or of several stacks or none."""
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    if checkpoint.config.get("model_type") == COMPACT:
        raise CheckpointError(f"{checkpoint.label} is a compact model already; fold the model that it stands for (expanded)")
    parts = parts_of(checkpoint)
    (part, *more) = parts.values()
    if more or not part.layers:
        raise CheckpointError(f"{checkpoint.label} has {'several stacks' if more else 'no stack'} of blocks; folding is for models of one")
    if checkpoint.config and not part.counts:
        raise CheckpointError(f"{checkpoint.label}: config.json does not speak of {len(part.layers)} layers, so it cannot say that there are fewer")
    return part


def folded(checkpoint: Checkpoint, fold: Fold) -> Checkpoint:
    """The model after surgery, as an ordinary one: every block with weights of its own, those of a group equal.

    Errors: OptionError for a fold that the model does not have the blocks for; CheckpointError as `stack_of`, and where blocks that share differ in shape.
    """
    part = stack_of(checkpoint)
    return operated(checkpoint, fold, part, shareable(checkpoint, part))


def operated(checkpoint: Checkpoint, fold: Fold, part: Part, shared: Collection[str], once: bool = False) -> Checkpoint:
    """The model after surgery, in which the tensors `shared` of its blocks are those of groups; with `once` a group's are there for its first block only.

    Errors: as `folded`.
    """
    if problems := list(fold.problems(len(part.layers))):
        raise OptionError("; ".join(problems))
    steps = [copy_step(checkpoint, name) for name in (*part.before, *part.after)]
    for place, own in enumerate(fold.kept):
        for name in part.layers[own]:
            new = part.moved(name, own, place)
            if name not in shared:
                steps.append(copy_step(checkpoint, name, new))
            elif not once or fold.first(place) == place:
                steps.append(mean_step(checkpoint, [part.moved(name, own, block) for block in fold.sources(place)], new))
    label = f"{checkpoint.label} folded to {len(fold.kept)} blocks" + (f" in {len(fold.parents)} groups" if len(fold.parents) < len(fold.kept) else "")
    gone = [str(block) for block in range(len(part.layers)) if block not in fold.kept]
    notes = [f"without the blocks {', '.join(gone)} of 0 to {len(part.layers) - 1}"] if gone else []
    return of_layers(Checkpoint(label, Plan(steps), checkpoint.files, (*checkpoint.notes, *notes)), part, fold.kept)


def kinds_of(checkpoint: Checkpoint) -> list[frozenset[tuple[str, str, tuple[int, ...]]]]:
    """Of each block what of it is shared: names as in the first block, dtypes and shapes. Blocks can share where these are equal. Errors: as `stack_of`."""
    part = stack_of(checkpoint)
    shared = shareable(checkpoint, part)
    specs = checkpoint.specs
    return [
        frozenset((part.moved(name, block, 0), specs[name].dtype, specs[name].shape) for name in layer if name in shared)
        for block, layer in enumerate(part.layers)
    ]


def shareable(checkpoint: Checkpoint, part: Part) -> frozenset[str]:
    """The tensors of blocks that share: linear weights, their biases, and what else is no vector: routers, packed experts."""
    tensors = describe(checkpoint).tensors
    linears = {meaning.module for meaning in tensors.values() if meaning.role == "linear"}
    inside = (name for layer in part.layers for name in layer)
    return frozenset(
        name for name in inside
        if tensors[name].module in linears or (tensors[name].role == "other" and len(checkpoint.specs[name].shape) > 1)
    )  # fmt: skip


def mean_step(checkpoint: Checkpoint, names: Sequence[str], to: str) -> Step:
    """A copy, or the mean of several tensors, in float32, rounded once."""
    if len(names) == 1 and names[0] in checkpoint.specs:
        return copy_step(checkpoint, names[0], to)
    specs = [checkpoint.specs.get(name) for name in names]
    first = specs[0]
    if first is None or any(spec is None or (spec.shape, spec.dtype) != (first.shape, first.dtype) for spec in specs):
        raise CheckpointError(f"{checkpoint.label}: {' and '.join(names)} are to be one weight, but are not alike; fold blocks of one kind only")
    write = replace(first, name=to)
    return Step(tuple((checkpoint, name) for name in names), (write,), _mean, row_multiple(first))


def _mean(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
    wide = working_dtype(tensors[0].dtype)
    total = sum((tensor.to(wide) for tensor in tensors[1:]), tensors[0].to(wide))
    return [(total / len(tensors)).to(tensors[0].dtype)]
