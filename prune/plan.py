"""From a checkpoint and a sparsity to the pruned checkpoint: every tensor accounted for, nothing read yet.

Without a text, a weight is pruned by two steps: one scores it, and one, which reads weight and scores, sets to zero what counts least. What is compared
beyond a row is found by an exact order statistic of the scores, in a pass before. The weights of linear layers that stand in blocks are pruned (all linear
layers of a checkpoint without blocks); heads, embeddings, norms, biases and routers are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Measured, Plan, Scan, Step, TensorSpec, copy_step
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.finite import is_finite, nonfinite
from mergekit_plus.checkpoint.plan import row_multiple
from mergekit_plus.checkpoint.spec import check_patterns, matches, natural_order
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.model import ModelMap, adapter_reason, describe, quantized_reason
from mergekit_plus.noise import Noise
from mergekit_plus.statistics import Cut, largest

from .masks import Sparsity, lowest_of_rows, pack, packed_shape, unpack
from .pruner import PRUNERS, SCOPES, Pruner, Scope

MASK = "_mask"  # what the name of a weight's packed mask ends with
NOTHING = Cut(math.inf, -1, 0)


@dataclass(frozen=True)
class PruneOptions:
    """What pruning needs beside what goes and by which method."""

    exclude: tuple[str, ...] = ()  # shell patterns of tensors that stay as they are
    include: tuple[str, ...] = ()  # shell patterns of the tensors that the result has; all where there are none
    seed: int = 0
    device: str = "cpu"
    allow_nonfinite: bool = False


DEFAULTS = PruneOptions()


@dataclass(frozen=True)
class Chosen:
    """The weights to prune, by name, in natural order; what becomes of each is in the rest of the plan."""

    checkpoint: Checkpoint
    roles: ModelMap
    names: tuple[str, ...]
    copied: tuple[str, ...]

    def turned(self, name: str) -> bool:
        """Whether it is stored [in, out]."""
        return self.roles.tensors[name].transposed

    def inputs(self, name: str) -> int:
        """Inputs of an output row."""
        return self.checkpoint.specs[name].shape[0 if self.turned(name) else 1]

    def groups(self, scope: Scope) -> Iterator[tuple[str, ...]]:
        """The weights that are compared with one another: those of a block, or all."""
        if scope == "global":
            yield self.names
            return
        places = {name: self.roles.tensors[name] for name in self.names}
        blocks: dict[object, list[str]] = {}
        for name, place in places.items():
            blocks.setdefault(name if scope != "block" or place.block is None else (place.stack, place.block), []).append(name)
        yield from map(tuple, blocks.values())


def problems(
    sparsity: float | None,
    pattern: str | None,
    method: str,
    scope: str | None,
    options: Mapping[str, object],
    text: bool = False,
    repaired: bool = False,
) -> list[str]:
    """Everything wrong with these options, a sentence each. `text`: whether there is one; `repaired`: whether it serves more than to measure inputs."""
    found: list[str] = []
    try:
        Sparsity.of(sparsity, pattern)
    except OptionError as error:
        found.append(str(error))
    if method not in PRUNERS:
        return [*found, f"unknown {PRUNERS.kind} '{method}'.{nearest(method, PRUNERS)}"]
    chosen = PRUNERS[method]
    if scope is not None and pattern is not None:
        found.append(f"a pattern says itself what is compared: {pattern} inputs of a row; leave out the scope '{scope}'")
    elif scope is not None and scope not in chosen.scopes:
        found.append(_foreign_scope(chosen, scope))
    if chosen.calibrated and not text:
        found.append(f"{method} looks at the inputs of layers: give it a text with --calibration")
    elif repaired and not text:
        found.append("reconstruction and allocation need a text: give it with --calibration")
    elif text and not chosen.calibrated and not repaired:
        found.append(f"{method} needs no calibration text")
    return found + chosen.options.problems(options)


def scope_of(pruner: Pruner, sparsity: Sparsity, scope: str | None) -> Scope:
    """What is compared: the groups of rows of a pattern, what was asked for, or what the pruner does by itself. Errors: OptionError."""
    if sparsity.group or scope is None:
        return "row" if sparsity.group and not pruner.solves else pruner.scopes[0]
    for known in pruner.scopes:
        if known == scope:
            return known
    raise OptionError(_foreign_scope(pruner, scope))


def _foreign_scope(pruner: Pruner, scope: str) -> str:
    if scope not in SCOPES:
        return f"unknown scope '{scope}'.{nearest(scope, pruner.scopes)}"
    return f"{pruner.name} compares weights within {' or '.join(map(repr, pruner.scopes))}, not within '{scope}'"


def choose(checkpoint: Checkpoint, how: PruneOptions) -> Chosen:
    """The weights to prune.

    Errors: CheckpointError for what is quantised or an adapter, and where there is nothing to prune; OptionError for a pattern that matches nothing.
    """
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    check_patterns("--exclude", how.exclude, checkpoint.specs)
    check_patterns("--include", how.include, checkpoint.specs)
    roles = describe(checkpoint)
    kept = [name for name in sorted(checkpoint.specs, key=natural_order) if not how.include or matches(name, how.include)]
    linears = [name for name in roles.linears if checkpoint.specs[name].is_float and checkpoint.specs[name].numel]
    inside = set([name for name in linears if roles.tensors[name].block is not None] or linears)
    names = tuple(name for name in kept if name in inside and not matches(name, how.exclude))
    if not names:
        raise CheckpointError(f"{checkpoint.label} has nothing to prune: {'; '.join(['no linear layer in a block is left', *roles.notes])}")
    going = set(names)
    return Chosen(checkpoint, roles, names, tuple(name for name in kept if name not in going))


def check_fit(chosen: Chosen, sparsity: Sparsity) -> None:
    """Refuse a pattern that does not divide the inputs of a layer. Errors: CheckpointError."""
    misfits = {name: reason for name in chosen.names if (reason := sparsity.fits(chosen.inputs(name)))}
    if misfits:
        name = next(iter(misfits))
        others = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise CheckpointError(f"{chosen.checkpoint.label}: {name} {misfits[name]}{others}; leave layers out with --exclude, or choose another pattern")


def prune(
    checkpoint: Checkpoint,
    sparsity: Sparsity,
    method: str = "magnitude",
    scope: str | None = None,
    options: Mapping[str, object] | None = None,
    how: PruneOptions = DEFAULTS,
) -> Checkpoint:
    """The checkpoint with the least important weights of its linear layers set to zero, by a method that needs no text; everything else stays, byte for byte.

    Exactly `sparsity.count(size)` of the weights that are compared with one another go (more only where more were zero before): of equal scores the first
    in the order of the tensors' names and of the places in them; weights that are zero go before all others, so that pruning twice adds zeros to zeros.

    Errors: OptionError for impossible options; CheckpointError where the checkpoint is quantised, nothing is to be pruned, or a pattern does not divide.
    """
    pruner = PRUNERS[method]
    arguments = pruner.options.check(options or {})
    if pruner.calibrated:
        raise OptionError(f"{method} looks at the inputs of layers: give it a text (`calibrated.prune_on`)")
    chosen = choose(checkpoint, how)
    check_fit(chosen, sparsity)
    within = scope_of(pruner, sparsity, scope)
    scores = _scored(chosen, pruner, arguments, how)
    steps: list[Step] = [copy_step(checkpoint, name) for name in chosen.copied]
    for group in chosen.groups(within):
        measured, first = None, 0
        if within != "row":
            total = sum(checkpoint.specs[name].numel for name in group)
            measured = Measured(_cut(sparsity.count(total)), _label(within, chosen, group[0]), whole_model=within != "tensor")
        for name in group:
            spec = checkpoint.specs[name]
            turned = within == "row" and chosen.turned(name)
            run: Any = _ByRow(sparsity, turned) if within == "row" else _ByCut(first, spec.numel // spec.rows)
            step = Step(((checkpoint, name), (scores, name)), (spec,), run, 0 if turned else row_multiple(spec), measured)
            if measured is not None:
                measured.steps.append(step)
            steps.append(step)
            first += spec.numel
    return replace(pruned_checkpoint(chosen, steps), label=f"{checkpoint.label} pruned to {sparsity} by {method}")


def pruned_checkpoint(chosen: Chosen, steps: Sequence[Step]) -> Checkpoint:
    """A checkpoint of these steps in the order of the one they prune."""
    order = {name: number for number, name in enumerate(chosen.checkpoint.specs)}
    ordered = sorted(steps, key=lambda step: order[step.writes[0].name])
    return Checkpoint(chosen.checkpoint.label, Plan(ordered), chosen.checkpoint.files, (*chosen.checkpoint.notes, *chosen.roles.notes))


def _label(scope: Scope, chosen: Chosen, name: str) -> str:
    place = chosen.roles.tensors[name]
    return "prune: measuring" + (f" {place.stack}.{place.block}" if scope == "block" and place.block is not None else "")


def _scored(chosen: Chosen, pruner: Pruner, arguments: Mapping[str, Any], how: PruneOptions) -> Checkpoint:
    """The scores of the weights under their names: -1 for those that are zero, float32 (float64 of float64 weights)."""
    steps = []
    for name in chosen.names:
        spec = chosen.checkpoint.specs[name]
        scores = TensorSpec(name, "F64" if spec.dtype == "F64" else "F32", spec.shape)
        steps.append(Step(((chosen.checkpoint, name),), (scores,), _Score(chosen.checkpoint.label, scores, pruner, arguments, how), row_multiple(spec)))
    return Checkpoint("scores", Plan(steps))


class _Score:
    """Score rows of one weight."""

    def __init__(self, label: str, spec: TensorSpec, pruner: Pruner, arguments: Mapping[str, Any], how: PruneOptions) -> None:
        self.label, self.spec, self.pruner, self.arguments, self.how = label, spec, pruner, arguments, how

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        (weight,) = tensors
        if not self.how.allow_nonfinite and not is_finite(weight):
            raise nonfinite(self.label, self.spec.name, weight)
        noise = {"noise": Noise(self.how.seed, self.spec.name, first_row * self.spec.numel // self.spec.rows)} if self.pruner.takes_noise else {}
        with torch.no_grad():
            scores = self.pruner.function(weight.to(self.how.device), **noise, **self.arguments).to("cpu", TORCH_DTYPES[self.spec.dtype])
        return (as_scores(scores, weight),)


def as_scores(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores that can be compared: -1 for a weight that is zero, which so goes before all others; the greatest number for one that is NaN or infinite."""
    most = torch.finfo(scores.dtype).max
    return scores.nan_to_num(nan=most, posinf=most).masked_fill_(weight == 0, -1)


def _cut(count: int) -> Callable[[Scan], Cut]:
    """The statistic that finds the `count` least scores: the largest of the negated ones, of which the first stay when they are equal."""
    return lambda scan: largest(_Scores(scan), lambda base, read: [-read[1]], [count])[0] if count else NOTHING


@dataclass(frozen=True)
class _Scores:
    """A scan as a statistic sees it: no base, and the tensors that a step reads."""

    scan: Scan

    @property
    def size(self) -> int:
        return self.scan.size

    def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False, only: Collection[int] | None = None) -> Sequence[Any]:
        return self.scan.map(lambda tensors: function(None, tensors), sample, only)

    def recall(self, compute: Callable[[], Any]) -> Any:
        return self.scan.recall(compute)


class _ByCut:
    """Set to zero what a cut found: rows of a weight whose first element is the `first` of all that were compared."""

    def __init__(self, first: int, width: int) -> None:
        self.first, self.width = first, width

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Cut) -> Sequence[Tensor]:
        weight, scores = tensors
        removed = scores < -measured.threshold
        at = measured.last + 1 - self.first - first_row * self.width  # those before it that equal the threshold go as well
        if at > 0:
            removed.view(-1)[:at] |= scores.reshape(-1)[:at] == -measured.threshold
        return (weight.masked_fill(removed, 0),)


class _ByRow:
    """Set to zero the least of each row, or of each group in it."""

    def __init__(self, sparsity: Sparsity, turned: bool) -> None:
        self.sparsity, self.turned = sparsity, turned

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        weight, scores = tensors
        removed = lowest_of_rows(scores.T.contiguous(), self.sparsity).T if self.turned else lowest_of_rows(scores, self.sparsity)
        return (weight.masked_fill(removed, 0),)


# ---- masks in files ----


def masks_of(checkpoint: Checkpoint, how: PruneOptions = DEFAULTS) -> Checkpoint:
    """The masks of a pruned checkpoint, packed: `<weight>_mask`, one bit a weight [rows, ceil(width / 8)], 1 where the weight is not zero."""
    chosen = choose(checkpoint, how)
    steps = []
    for name in chosen.names:
        spec = chosen.checkpoint.specs[name]
        write = TensorSpec(f"{name}{MASK}", "U8", packed_shape(spec.shape))
        steps.append(Step(((checkpoint, name),), (write,), lambda tensors, first_row, measured: (pack(tensors[0] != 0),), row_multiple(spec)))
    return Checkpoint(f"masks of {checkpoint.label}", Plan(steps))


def apply_masks(checkpoint: Checkpoint, masks: Checkpoint, how: PruneOptions = DEFAULTS) -> Checkpoint:
    """The checkpoint with zeros where another has them: in its packed masks, or in its weights, for a pruned checkpoint's own zeros are its mask.

    Errors: CheckpointError where a weight has no mask, or one of another shape.
    """
    chosen = choose(checkpoint, how)
    steps = [copy_step(checkpoint, name) for name in chosen.copied]
    for name in chosen.names:
        spec = checkpoint.specs[name]
        packed = f"{name}{MASK}" in masks.specs
        found = masks.specs.get(f"{name}{MASK}" if packed else name)
        if found is None:
            raise CheckpointError(f"{masks.label} has no mask of {name}; leave the layer out with --exclude, or give the masks of this model")
        if found.shape != (packed_shape(spec.shape) if packed else spec.shape) or (packed and found.dtype != "U8"):
            raise CheckpointError(f"{masks.label}: {found.name} is {found.dtype} {list(found.shape)}, no mask of a weight of {list(spec.shape)}")
        steps.append(Step(((checkpoint, name), (masks, found.name)), (spec,), _Masked(packed), row_multiple(spec)))
    return replace(pruned_checkpoint(chosen, steps), label=f"{checkpoint.label} under the mask of {masks.label}")


class _Masked:
    """Set to zero what a mask, or another weight, has as zero."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        weight, mask = tensors
        return (weight.masked_fill(~unpack(mask, weight.shape[-1]) if self.packed else mask == 0, 0),)
