"""Steps that take weights or blocks out of a model, and retrain what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prune.fold.plan_file import FoldPlan

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint
from ..errors import OptionError, nearest, not_inputs
from .base import Execution, Strict, lesson_rows, source_of, with_lesson

if TYPE_CHECKING:
    from torch import Tensor

    from prune.fold import Fold


class RepairOptions(BaseModel):
    """`reconstruct:` of a pruning step — the keys beside these are options of the training and of what trains, as of `retrain:`."""

    model_config = ConfigDict(extra="allow")

    granularity: Literal["block", "sublayer", "linear"] = "block"
    train: list[str] = Field(default_factory=lambda: ["biases", "norms", "mask_lora"])

    @property
    def split(self) -> tuple[Any, dict[str, Any], list[str]]:
        """The options of the training, those of what trains, and what is wrong with them."""
        from dataclasses import asdict

        from prune.reconstruct import ReconstructOptions
        from prune.retrain import split_options

        return split_options({**asdict(ReconstructOptions().training), **(self.model_extra or {})}, self.train)


class PruneStep(BaseModel):
    """`prune:` — the keys beside these are options of the pruner."""

    model_config = ConfigDict(extra="allow")

    sparsity: float | None = None
    pattern: str | None = None
    structured: dict[str, float] | None = None  # what goes whole: {mlp: 0.25, heads: 0.5}
    mask: str | None = None  # an input whose zeros, or whose packed masks, are taken
    method: str = "magnitude"
    scope: str | None = None
    calibration: CalibrationOptions | None = None  # a text, for methods that look at the inputs of layers
    allocate: bool = False  # a sparsity for each layer, measured on the text
    reconstruct: RepairOptions | None = None  # or its granularity alone: block, sublayer, linear
    seed: int = 0
    exclude: list[str] = Field(default_factory=list)
    include: list[str] = Field(default_factory=list)
    of: str | None = None

    @field_validator("reconstruct", mode="before", json_schema_input_type=RepairOptions | str | None)
    @classmethod
    def _granularity_alone(cls, value: object) -> object:
        return {"granularity": value} if isinstance(value, str) else value

    @field_validator("pattern", mode="before", json_schema_input_type=str | int | None)
    @classmethod
    def _without_quotes(cls, value: object) -> object:
        """YAML reads 2:4 as 2 * 60 + 4, minutes and seconds."""
        return f"{value // 60}:{value % 60}" if isinstance(value, int) and value > 60 else value

    @property
    def asked(self) -> str:
        """What goes, in a word."""
        return self.pattern or (f"{self.sparsity:g}" if self.sparsity is not None else f"as in {self.mask}")

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from prune.plan import problems
        from prune.structured import problems as structured_problems

        given = [key for key in ("sparsity", "pattern", "structured", "mask") if getattr(self, key) is not None]
        if len(given) != 1:
            yield f"prune: say what goes with one of sparsity, pattern, structured and mask, not with {' and '.join(given) or 'none of them'}"
        elif self.structured is not None:
            yield from (f"prune: {problem}" for problem in structured_problems(self.structured))
        elif self.mask is None:
            text, repaired = self.calibration is not None, self.reconstruct is not None or self.allocate
            for problem in problems(self.sparsity, self.pattern, self.method, self.scope, self.model_extra or {}, text, repaired):
                yield f"prune: {problem}"
        if self.allocate and (self.sparsity is None or self.reconstruct is not None or self.scope in ("block", "global")):
            yield "prune: allocate deals out a sparsity to layers that are compared within rows or tensors, and goes without reconstruct"
        if self.reconstruct is not None:
            if self.mask is not None or self.structured is not None:
                yield "prune: reconstruct goes with a sparsity or a pattern"
            yield from (f"prune, reconstruct: {problem}" for problem in self.reconstruct.split[-1])
        named = [name for name in (self.of, self.mask) if name is not None]
        yield from (f"prune: {problem}" for problem in not_inputs(named, inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune import Sparsity
        from prune.calibrated import prune_on, shrink_on
        from prune.plan import PruneOptions, apply_masks, prune
        from prune.structured import shrink

        source = source_of(self.of, inputs, previous, "prune", aside=self.mask)
        options = PruneOptions(tuple(self.exclude), tuple(self.include), self.seed, how.device, how.save.allow_nonfinite)
        if self.mask is not None:
            return apply_masks(source, inputs[self.mask], options)
        ids, notes = self.calibration.placed(how.folder).read(source) if self.calibration else (None, [])
        if self.structured is not None:
            result = shrink(source, self.structured) if ids is None else shrink_on(source, ids, self.structured, options)
        else:
            asked = Sparsity.of(self.sparsity, self.pattern), self.method, self.scope, self.model_extra or {}, options
            if self.allocate and ids is not None:
                from ..sparsities import prune_allocated

                result = prune_allocated(source, ids, *asked)
            else:
                result = prune(source, *asked) if ids is None else prune_on(source, ids, *asked, self._repair())
        return replace(result, notes=(*result.notes, *notes))

    def _repair(self) -> Any:
        from prune.calibrated import Repair
        from prune.reconstruct import ReconstructOptions

        if self.reconstruct is None:
            return None
        training, variant_options, _ = self.reconstruct.split
        return Repair(tuple(self.reconstruct.train), ReconstructOptions(self.reconstruct.granularity, variant_options, training))


class RetrainStep(BaseModel):
    """`retrain:` — the keys beside these are options of the training (steps, lr, batch) and of what trains (rank, alpha, k)."""

    model_config = ConfigDict(extra="allow")

    train: list[str]
    text: CalibrationOptions
    teacher: str | None = None  # an input
    distill: float = Field(default=1.0, ge=0, le=1)
    tail: int = Field(default=0, ge=0)  # of the last blocks, those that are drawn towards the teacher's blocks that they were
    tail_weight: float = Field(default=1.0, ge=0)
    kept: list[int] | None = None  # which of the teacher's blocks the model's were, where a compact model does not say it
    tune_lr: bool = False
    allow_densify: bool = False
    of: str | None = None

    @field_validator("train", mode="before", json_schema_input_type=list[str] | str)
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from prune.retrain import split_options

        *_, found = split_options(self.model_extra or {}, self.train)
        yield from (f"retrain: {problem}" for problem in found)
        yield from (f"retrain: {problem}" for problem in not_inputs([name for name in (self.of, self.teacher) if name is not None], inputs))
        if self.tune_lr and "lr" in (self.model_extra or {}):
            yield "retrain: tune_lr finds the rate; leave out lr, or tune_lr"
        if self.tail and self.teacher is None:
            yield "retrain: the tail is drawn towards a teacher's blocks; name one, or leave tail out"

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune.fold import without_voices
        from prune.retrain import HELD_OUT, RetrainOptions, retrain, split_options

        training, variant_options, _ = split_options(self.model_extra or {}, self.train)
        source = source_of(self.of, inputs, previous, "retrain")
        rows = lesson_rows(self.text, training.steps * training.batch + HELD_OUT, without_voices(source), how)
        options = RetrainOptions(
            tuple(self.train), rows, variant_options, training, distill=self.distill, tail=self.tail, tail_weight=self.tail_weight,
            kept=None if self.kept is None else tuple(self.kept), tune_lr=self.tune_lr, allow_densify=self.allow_densify, device=how.device,
        )  # fmt: skip
        made = retrain(source, options, inputs[self.teacher] if self.teacher else None)
        return with_lesson(made, training.steps, training.batch, rows)


class FoldStep(Strict):
    """`fold:` — fewer blocks, and blocks that share their linear weights."""

    remove: float = 0  # a share of the blocks, or a number of them; which ones is found on the text, unless `keep` says it
    keep: list[int] | None = None  # the blocks that stay, in order
    by: str = "leave-one-out"
    pinned: list[int] = Field(default_factory=list)  # blocks that stay whatever is found
    share: int = Field(default=1, ge=1)  # blocks in a group
    map: Literal["sequence", "cycle", "middle_cycle"] = "sequence"  # which blocks those are
    parent: Literal["first", "average", "stepwise", "loss"] = "first"
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

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from prune.fold import SCORES

        if self.plan is not None:
            yield from (f"fold, plan: {problem}" for problem in self.plan.problems())
            if self.keep is not None or self.remove or self.share > 1:
                yield "fold: a plan says which blocks stay and which share; leave keep, remove and share out"
        elif self.keep is None and not self.remove and self.share == 1:
            yield "fold: say how many blocks to remove, or which to keep, or how many are to share"
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
