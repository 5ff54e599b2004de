"""Steps that take weights out of a model, and retrain what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint
from ..errors import not_inputs
from .base import Execution, lesson_rows, source_of, with_lesson


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
