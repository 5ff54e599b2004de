"""Steps that fold a model's depth, and hand what was folded to others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prune.fold.maps import Map, Source
from prune.fold.plan_file import FoldPlan

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint
from ..errors import OptionError, nearest, not_inputs
from .base import Execution, Strict, source_of

if TYPE_CHECKING:
    from torch import Tensor

    from prune.fold import Fold


class FoldStep(Strict):
    """`fold:` — fewer blocks, and blocks that share their linear weights."""

    remove: float = 0  # a share of the blocks, or a number of them; which ones is found on the text, unless `keep` says it
    keep: list[int] | None = None  # the blocks that stay, in order
    by: str = "leave-one-out"
    pinned: list[int] = Field(default_factory=list)  # blocks that stay whatever is found
    share: int = Field(default=1, ge=1)  # blocks in a group
    map: Map = "sequence"  # which blocks those are
    parent: Source = "first"
    parents: list[int] | None = None  # for each group the block whose weights it has, where that was found
    relax: str | None = None  # lora:RANK[:zero]: what a block had beyond its group, as low-rank factors of its own
    compact: bool = False  # what blocks share is stored once
    plan: FoldPlan | None = None  # all of this, as `compress fold --budget` found it; its file is read when the recipe is
    residual_scale: bool = False  # fit a factor for each residual branch to the text
    calibration: CalibrationOptions | None = None
    scores: list[float] | None = None  # how much each block counts, where that was found
    of: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be found out which blocks go, or whose weights groups have."""
        return (self.remove > 0 and self.keep is None) or (self.parent == "loss" and self.parents is None)

    @property
    def _says_how(self) -> bool:
        """Whether it says which blocks share, or whose weights."""
        return self.map != "sequence" or self.parent != "first"

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from prune.fold import SCORES

        if self.plan is not None:
            yield from (f"fold, plan: {problem}" for problem in self.plan.problems())
            if self.keep is not None or self.remove or self.share > 1:
                yield "fold: a plan says which blocks stay and which share; leave keep, remove and share out"
            if self._says_how:
                yield "fold: a plan says which blocks share, and whose weights; leave map and parent out"
        elif self.keep is None and not self.remove and self.share == 1:
            yield "fold: say how many blocks to remove, or which to keep, or how many are to share"
        elif self.share == 1 and self._says_how:
            yield "fold: map and parent are for blocks that share; say how many do with --share"
        if self.pinned and not self.remove:
            yield "fold: pinned keeps blocks that remove would take; say how many it takes, or leave pinned out"
        if self.keep is not None and self.remove and self.scores is None:
            yield "fold: keep says which blocks stay; leave remove out"
        if self.by not in SCORES:
            yield f"fold: unknown importance '{self.by}'.{nearest(self.by, SCORES)}"
        if self.compact and self.share == 1 and self.plan is None:
            yield "fold: compact stores once what blocks share; say how many share with share"
        if self.remove and self.keep is None and self.calibration is None:
            yield "fold: which blocks go is found on a text: give one with --calibration FILE, or the blocks that stay with --keep"
        elif self.is_open and self.calibration is None:
            yield "fold: the parents that lose least are found on a text: give one with --calibration FILE, or another --parent"
        if self.parents is not None and self.parent != "loss":
            yield f"fold: parents are what `parent: loss` found; leave them out, or parent: {self.parent}"
        if self.relax is not None:
            yield from self._relax_problems(self.relax)
        if self.residual_scale and (self.share > 1 or self.compact or self.relax):
            yield "fold: blocks that share their weights cannot have a scale each; leave residual_scale out, or share, relax and compact"
        if self.residual_scale and self.calibration is None:
            yield "fold: residual_scale is fitted on a text: give one with --calibration FILE"
        if self.of is not None:
            yield from (f"fold: {problem}" for problem in not_inputs([self.of], inputs))

    def _relax_problems(self, asked: str) -> Iterator[str]:
        from prune.fold import rank_of

        try:
            rank_of(asked)
        except OptionError as error:
            yield f"fold: {error}"
        if self.share == 1 and self.plan is None:
            yield "fold: relax is for blocks that share; say how many do with --share"

    def found(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> FoldStep:
        """The same step with the blocks that stay, and the parents of groups."""
        source = source_of(self.of, inputs, previous, "fold")
        assert self.calibration is not None
        rows, _ = self.calibration.placed(how.folder).read(source)
        step = self._with_blocks(source, rows, how) if self.remove and self.keep is None else self
        return step._with_parents(source, rows, how) if step.is_open else step

    def _with_blocks(self, source: Checkpoint, rows: Tensor, how: Execution) -> FoldStep:
        from prune.fold import find

        assert self.calibration is not None
        found = find(
            source, rows, self.remove, self.by, pinned=self.pinned, seed=self.calibration.seed, device=how.device, progress=how.save.progress
        )  # fmt: skip
        how.save.progress.tell(f"fold: {self.by} takes out {', '.join(map(str, found.removed))} of the blocks 0 to {len(found.scores) - 1}")
        return self.model_copy(update={"keep": list(found.kept), "scores": [round(score, 6) for score in found.scores]})

    def _with_parents(self, source: Checkpoint, rows: Tensor, how: Execution) -> FoldStep:
        from prune.fold import find_parents

        found = find_parents(source, self._fold(source), rows, device=how.device, progress=how.save.progress)
        how.save.progress.tell(f"fold: groups have the weights of the blocks {', '.join(map(str, found))}")
        return self.model_copy(update={"parents": list(found)})

    def _fold(self, source: Checkpoint) -> Fold:
        """What becomes of the blocks; where that is still to be found, as many of them."""
        from prune.fold import count_of, mapped, stack_of

        blocks = len(stack_of(source).layers)
        if self.plan is not None:
            return self.plan.fold_for(blocks)
        keep = self.keep if self.keep is not None else range(blocks - count_of(self.remove, blocks))
        parent = "first" if self.parent == "loss" and self.parents is None else self.parent
        return mapped(keep, self.share, self.map, parent, self.parents)

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune.fold import compacted, expanded, folded, rank_of, relaxed
        from prune.fold.scale import rescaled

        source = source_of(self.of, inputs, previous, "fold")
        fold = self._fold(source)
        if self.residual_scale and self.calibration is not None:
            rows, notes = self.calibration.placed(how.folder).read(source)
            result = rescaled(source, folded(source, fold), fold, rows, how.device)
            return replace(result, notes=(*result.notes, *notes))
        if self.relax is None:
            return (compacted if self.compact else folded)(source, fold)
        made = relaxed(source, fold, *rank_of(self.relax))
        return made if self.compact else expanded(made)


class ExportFoldStep(Strict):
    """`export_fold:` — a compact model for peft: a base, or the adapter that makes the model of it."""

    part: Literal["base", "adapter"]
    layout: Literal["peft", "lora"] = "peft"  # layers that peft replicates; or all of them, and a plain adapter
    base: str | None = None  # where the adapter says that its base is
    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        if self.of is not None:
            yield from (f"export_fold: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune.fold.export import exported

        base, adapter = exported(source_of(self.of, inputs, previous, "export_fold"), self.layout, self.base)
        return base if self.part == "base" else adapter
