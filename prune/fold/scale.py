"""A scale for each residual branch of a model whose blocks are fewer: one number for what attention adds to the hidden states, and one for the MLP.

With h what enters a branch of the shorter model, f what the branch adds to it, and t the hidden states of the original that it should lead to, the scale is
that of least squares, <f, t - h> / <f, f> over all tokens of a text, within 0.25 and 2; block after block, each behind those that have theirs. t is, of
attention, what stands behind the same attention in the original; of the MLP, what enters the block that comes next in the shorter model, so that the branch
also makes up for the blocks that are gone in between. A scale goes into the weights that end its branch, and their biases. (Calibrated, in place of the
constants 1/n and 1/sqrt(n) of arXiv 2510.03470, which are for training.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from mergekit_plus.adapters.product import working_dtype
from mergekit_plus.calibration.skeleton import Call, Skeleton
from mergekit_plus.calibration.states import batch_size
from mergekit_plus.checkpoint import Checkpoint, Deferred, Plan, Step, TensorSpec, Work, copy_step
from mergekit_plus.checkpoint.plan import row_multiple
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.layers import Kind, positions
from mergekit_plus.model import describe

from .measure import With
from .surgery import Fold

LIMITS = (0.25, 2.0)
BRANCHES: tuple[Kind, ...] = get_args(Kind)[:2]  # attention, mlp
# The layers that end a branch, by the last part of their names.
WRITERS = frozenset({"o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "w2", "wo"})
_SCALES = "residual_scales"


def rescaled(original: Checkpoint, short: Checkpoint, fold: Fold, rows: Tensor, device: str = "cpu") -> Checkpoint:
    """The folded model `short` with its branches scaled towards the original on a text, rows: int64 [windows, window].

    Blocks that share weights have none of their own to scale, and stay as they are. Nothing is computed before a tensor is read. Memory: two blocks in
    float32, and the hidden states of the text three times.
    Errors: OptionError where all blocks share, or stand in another order; CheckpointError for blocks that are no sums of two branches, and as `Skeleton`.
    """
    alone = tuple(place for place, group in enumerate(fold.groups) if fold.groups.count(group) == 1)
    if not alone or list(fold.kept) != sorted(set(fold.kept)):
        what = "are not in the order of the model" if alone else "all share their weights"
        raise OptionError(f"a scale for each residual branch is fitted to blocks in their order, with weights of their own; these {what}")
    ends = writers(short)
    if missing := next(((place, kind) for place in alone for kind in BRANCHES if not ends[place][kind]), None):
        raise CheckpointError(f"{short.label}: which weight ends the {missing[1]} branch of block {missing[0]} is not known, so that it cannot be scaled")
    hidden = max(short.specs[name].rows for name in ends[alone[0]]["mlp"])
    block = max(sum(short.specs[name].numel for name in names) for names in describe(short).blocks.values())
    spec = TensorSpec(_SCALES, "F64", (len(fold.kept), len(BRANCHES)))
    fit = _Fit(original, short, fold, rows, device, alone)
    made = Checkpoint("scales", Deferred([spec], [original, short], fit.compute, memory=8 * block + 12 * rows.numel() * hidden))
    places = {name: (place, BRANCHES.index(kind)) for place in alone for kind in BRANCHES for name in ends[place][kind]}

    def step(name: str) -> Step:
        if name not in places:
            return copy_step(short, name)
        own = short.specs[name]
        return Step(((short, name), (made, _SCALES)), (own,), partial(_scale, *places[name]), row_multiple(own), takes=(None, "whole"))

    return Checkpoint(f"{short.label}, branches scaled", Plan(map(step, short.specs)), short.files, short.notes)


def writers(checkpoint: Checkpoint) -> list[dict[Kind, tuple[str, ...]]]:
    """Of each block the tensors that end its branches: weights of linear layers, and their biases."""
    known, where = describe(checkpoint), positions(checkpoint)
    found: list[dict[Kind, tuple[str, ...]]] = []
    for names in known.blocks.values():
        ends = [name for name in names if known.tensors[name].role in ("linear", "bias", "other") and _leaf(known.tensors[name].module) in WRITERS]
        found.append({kind: tuple(name for name in ends if where[name].kind == kind) for kind in BRANCHES})
    return found


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _scale(place: int, branch: int, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
    weight, scale = tensors[0], float(tensors[1][place, branch])
    return [weight if scale == 1 else (weight.to(working_dtype(weight.dtype)) * scale).to(weight.dtype)]


# ---- the fit ----


@dataclass
class _Side:
    """One of the two models: its blocks, what they are called with, and the text's hidden states before the block at hand."""

    skeleton: Skeleton
    rows: Tensor
    device: str
    states: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for states, calls in self.skeleton.record(torch.split(self.rows, batch_size(self.rows.shape[1]))):
            self.states.append(states)
            self.calls.append(calls)

    def parameters(self, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of a block that hold these tensors, by their names in it."""
        tensors, prefix = self.skeleton.map.tensors, f"{self.skeleton.stack}.{number}."
        inside = [str(tensors[name].parameter).removeprefix(prefix) for name in names]
        return {name: self.skeleton.blocks[number].get_parameter(name) for name in inside}

    def run(self, number: int, batch: int, *scales: tuple[Mapping[str, Tensor], float]) -> Tensor:
        """What a block makes of a batch when these parameters are so many times what they are."""
        block = self.skeleton.blocks[number]
        scaled = {name: value * scale for values, scale in scales for name, value in values.items()}
        output = self.calls[batch][number](With(block, scaled) if scaled else block, self.states[batch].to(self.device))
        return output.cpu()

    def runs(self, number: int, *scales: tuple[Mapping[str, Tensor], float]) -> list[Tensor]:
        """The same of every batch."""
        return [self.run(number, batch, *scales) for batch in range(len(self.states))]

    def advance(self, first: int, last: int) -> None:
        """Through the blocks from `first` to before `last`."""
        for number in range(first, last):
            self.pass_through(number)

    def pass_through(self, number: int, without: Sequence[str] = ()) -> list[Tensor]:
        """Through a block; what it would have made without these tensors."""
        self.skeleton.load_block(number, self.device)
        less = self.runs(number, (self.parameters(number, without), 0.0)) if without else []
        self.states = self.runs(number)
        self.skeleton.drop_block(number)
        return less


@dataclass(frozen=True)
class _Fit:
    """The two models, the text, and the blocks of the shorter one that are scaled."""

    original: Checkpoint
    short: Checkpoint
    fold: Fold
    rows: Tensor
    device: str
    alone: tuple[int, ...]

    def compute(self, work: Work) -> None:
        work.part("scales", lambda: {_SCALES: self.scales(work)})

    def scales(self, work: Work) -> Tensor:
        """Of each block, of its branches, float64 [blocks, 2]."""
        kept, found = self.fold.kept, torch.ones(len(self.fold.kept), len(BRANCHES), dtype=torch.float64)
        theirs_end, ours_end = writers(self.original), writers(self.short)
        with torch.no_grad(), work.progress.phase("scaling", len(kept), " blocks"):
            theirs, ours = (_Side(Skeleton(checkpoint), self.rows, self.device) for checkpoint in (self.original, self.short))
            theirs.advance(0, kept[0])
            for place, (own, following) in enumerate(zip(kept, (*kept[1:], len(theirs_end)), strict=True)):
                if place in self.alone:
                    middle = theirs.pass_through(own, theirs_end[own]["mlp"])
                    theirs.advance(own + 1, following)
                    found[place] = self._block(ours, place, ours_end[place], middle, theirs.states)
                else:
                    theirs.advance(own, following)
                    ours.advance(place, place + 1)
                work.progress.advance(1)
        work.progress.tell("scales, attention/mlp of each block: " + ", ".join(f"{first:.2f}/{second:.2f}" for first, second in found.tolist()))
        return found

    def _block(self, side: _Side, place: int, ends: Mapping[Kind, Sequence[str]], middle: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        """The scales of one block, float64 [2]; the text goes through it with them."""
        side.skeleton.load_block(place, self.device)
        attention, mlp = (side.parameters(place, ends[kind]) for kind in BRANCHES)
        _check(self.short, side, place, attention, mlp)
        first = fitted(side.states, side.runs(place, (mlp, 0.0)), middle)
        before, after = side.runs(place, (attention, first), (mlp, 0.0)), side.runs(place, (attention, first))
        second = fitted(before, after, target)
        side.states = [start + second * (end - start) for start, end in zip(before, after, strict=True)]
        side.skeleton.drop_block(place)
        return torch.tensor([first, second], dtype=torch.float64)


def fitted(before: Sequence[Tensor], after: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """The scale of what was added to `before` that comes nearest to `target`, to six decimals, within `LIMITS`; 1 of what adds nothing. Sums in float64."""
    toward = own = 0.0
    for start, end, goal in zip(before, after, target, strict=True):
        added = end.double() - start.double()
        toward += float((added * (goal.double() - start.double())).sum())
        own += float((added * added).sum())
    return min(max(round(toward / own, 6), LIMITS[0]), LIMITS[1]) if own else 1.0


def _check(short: Checkpoint, side: _Side, place: int, attention: Mapping[str, Tensor], mlp: Mapping[str, Tensor]) -> None:
    """That a block is what enters it and what its branches add; CheckpointError where a norm stands behind a branch, or the sum."""
    states = side.states[0]
    nothing, whole, half = (side.run(place, 0, (attention, scale), (mlp, 0.0)) for scale in (0.0, 1.0, 0.5))
    none, both, middle = (side.run(place, 0, (attention, 0.0), (mlp, scale)) for scale in (0.0, 1.0, 0.5))
    pairs = ((nothing, states), (none, states), (half, (states + whole) / 2), (middle, (states + both) / 2))
    if not all(torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(states.abs().max())) for found, wanted in pairs):
        reason = "is not the sum of what enters it and its branches, as where norms stand behind them"
        raise CheckpointError(f"{short.label}: block {place} {reason}; it cannot be scaled")
