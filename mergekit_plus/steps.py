"""The operations that a recipe composes: their YAML keys, what is wrong with them, and the checkpoint that each makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from quant.bits_file import GroupScheme
from quant.bits_file import read as read_allocation

from .calibration.options import CalibrationOptions
from .checkpoint import Checkpoint, SaveOptions
from .checkpoint.dtypes import parse_float_dtype
from .errors import CompressError, OptionError, RecipeError, nearest, not_inputs
from .merge import METHODS
from .merge.plan import MergeOptions, merge, problems
from .moe.config import MoeConfig
from .search.space import SearchOptions
from .vocabulary import TokenizerSpec, retokenize


class Strict(BaseModel):
    """A schema that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Execution:
    """How a recipe is carried out; changes no value of the result."""

    save: SaveOptions = field(default_factory=SaveOptions)
    device: str = "cpu"
    out: Path | None = None
    cache: bool = False  # bring what lies on the Hub into the local cache first
    push: str | None = None  # a repository to which the output goes as well
    private: bool = False  # where it has to be created
    folder: Path = Path()  # what the texts of steps are relative to: the recipe's


class MergeStep(BaseModel):
    """`merge:` — the keys beside these are options of the method."""

    model_config = ConfigDict(extra="allow")

    method: str = "linear"
    models: dict[str, dict[str, Any]] | list[str]  # names of inputs, or name: {option: value of this model}
    base: str | None = None
    dtype: str | None = None
    input_dtype: str | None = None
    exclude: list[str] = Field(default_factory=list)
    include: list[str] = Field(default_factory=list)
    seed: int = 0
    search: SearchOptions | None = None  # options to be found before the merge
    searched: dict[str, Any] | None = None  # the record of the search that found these options
    tokenizer: TokenizerSpec | None = None  # or its source alone: union, base, an input

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _short_tokenizer(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, value: object) -> object:
        """Refuse in one sentence what is neither a list nor a table; `code:` with nothing after it has no options of its own."""
        if isinstance(value, dict):
            value = {name: {} if own is None else own for name, own in value.items()}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        wanted: type = dict if isinstance(value, dict) else str
        if not parts or not all(isinstance(part, wanted) for part in parts):
            raise ValueError("a list of inputs, as in [code, docs], or a table with the options of each, as in {code: {weight: 0.6}, docs: {}}")
        return value

    def options(self) -> dict[str, Any]:
        """The method's options; per-model ones gathered in the models' order."""
        given = dict(self.model_extra or {})
        if isinstance(self.models, dict):
            for name in dict.fromkeys(name for own in self.models.values() for name in own):
                if all(name in own for own in self.models.values()):
                    given[name] = [own[name] for own in self.models.values()]
                elif name in given or _default_of(self.method, name) is not None:
                    rest = given.get(name, _default_of(self.method, name))
                    given[name] = [own.get(name, rest) for own in self.models.values()]
                else:  # no such option, which is for the method to say
                    given[name] = [own[name] for own in self.models.values() if name in own]
        return given

    def with_options(self, values: Mapping[str, Any]) -> MergeStep:
        """The same step with these options, whatever it or single models of it said of them."""
        models = self.models
        if isinstance(models, dict):
            models = {name: {key: value for key, value in own.items() if key not in values} for name, own in models.items()}
        return self.model_copy(update={"models": models, **values})

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"merge: {problem}" for problem in not_inputs((*self.models, *([self.base] if self.base else [])), inputs))
        for problem in self.tokenizer.problems(inputs) if self.tokenizer else ():
            yield f"merge, tokenizer: {problem}"
        for problem in problems(self.method, self.options(), len(self.models), self.base is not None):
            yield f"merge: {problem}"
        yield from _dtype_problems("merge", self.dtype, self.input_dtype)

    def search_problems(self, folder: Path) -> list[str]:
        """What is wrong with its search; texts are relative to `folder`."""
        return self.search.problems(self.method, self.options(), list(self.models), self.base, folder) if self.search else []

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        options = MergeOptions(
            parse_float_dtype(self.dtype) if self.dtype else None,
            parse_float_dtype(self.input_dtype) if self.input_dtype else None,
            tuple(self.exclude), tuple(self.include), self.seed, how.device, how.save.allow_nonfinite,
        )  # fmt: skip
        parts: Mapping[str, Checkpoint] = {name: inputs[name] for name in (*self.models, *([self.base] if self.base else []))}
        if self.tokenizer:
            parts = retokenize(parts, self.base, self.tokenizer, inputs)
        return merge([parts[name] for name in self.models], self.method, parts[self.base] if self.base else None, self.options(), options)


class MergeAdaptersStep(MergeStep):
    """`merge_adapters:` — as `merge:`, of inputs that are adapters of one base."""

    rank: int | None = None

    def options(self) -> dict[str, Any]:
        from .merge.adapters import SVD

        return MergeStep.options(self.model_copy(update={"method": "linear"}) if self.method == SVD else self)

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from .merge.adapters import adapter_problems

        yield from (f"merge_adapters: {problem}" for problem in not_inputs(self.models, inputs))
        for key in ("base", "exclude", "include", "input_dtype", "tokenizer", "search"):
            if getattr(self, key):
                yield f"merge_adapters: '{key}' is for models; adapters are merged without"
        for problem in adapter_problems(self.method, self.options(), len(self.models), self.rank):
            yield f"merge_adapters: {problem}"
        yield from _dtype_problems("merge_adapters", self.dtype)

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from .adapters import read_adapter
        from .merge.adapters import merge_adapters

        options = MergeOptions(
            parse_float_dtype(self.dtype) if self.dtype else None, seed=self.seed, device=how.device, allow_nonfinite=how.save.allow_nonfinite
        )
        return merge_adapters([read_adapter(inputs[name]) for name in self.models], self.method, self.options(), self.rank, options)


class ExtractAdapterStep(Strict):
    """`extract_adapter:` — the LoRA adapter that makes one input of another."""

    base: str
    tuned: str
    rank: int | None = None
    energy: float | None = None
    exclude: list[str] = Field(default_factory=list)
    save_rest: bool = False
    dtype: str = "float32"

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from .adapters.extract import ExtractOptions

        yield from (f"extract_adapter: {problem}" for problem in not_inputs((self.base, self.tuned), inputs))
        for problem in ExtractOptions(self.rank, self.energy).problems():
            yield f"extract_adapter: {problem}"
        yield from _dtype_problems("extract_adapter", self.dtype)

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from .adapters.extract import ExtractOptions, extract

        options = ExtractOptions(self.rank, self.energy, tuple(self.exclude), self.save_rest, parse_float_dtype(self.dtype))
        return extract(inputs[self.base], inputs[self.tuned], options, how.save.progress)


def with_lesson(made: Checkpoint, steps: int, batch: int, rows: Any) -> Checkpoint:
    """The same, with a note on how long it will train."""
    note = f"trains for {steps} steps of {batch} windows of {rows.shape[1]} tokens; {len(rows)} windows of the text are read"
    return replace(made, notes=(*made.notes, note))


def lesson_rows(text: CalibrationOptions, windows: int, model: Checkpoint, how: Execution) -> Any:
    """What a step trains on: at least as many windows as it reads, where the text has so many, int64 [windows, window]."""
    return text.model_copy(update={"windows": max(text.windows, windows)}).placed(how.folder).read(model)[0]


class LessonStep(Strict):
    """A step that may train on a text: for so many steps of so many windows, at a rate that has a default of its own."""

    text: CalibrationOptions | None = None
    steps: int = 200
    batch: int = 4
    lr: float | None = None
    seed: int = 0

    def lesson(self, model: Checkpoint, how: Execution, lr: float) -> Any:
        """What it trains on, None where it names no text: at least as many windows as its steps read, where the text has so many."""
        from quant.adapters.train import HELD_OUT, Lesson

        from .training import TrainOptions

        if self.text is None:
            return None
        ids = lesson_rows(self.text, self.steps * self.batch + HELD_OUT, model, how)
        training = TrainOptions(self.steps, lr if self.lr is None else self.lr, self.batch, schedule="cosine", warmup=0.05, clip=None, seed=self.seed)
        return Lesson(ids, training)

    def told(self, made: Checkpoint, lesson: Any) -> Checkpoint:
        """What it made, with a note on how long that trains."""
        return with_lesson(made, self.steps, self.batch, lesson.ids) if lesson else made


class QuantizeAdapterStep(LessonStep):
    """`quantize_adapter:` — a LoRA adapter at a few bits; distilled, with the base that it belongs to and a text."""

    bits: int = 4
    codebook: str = "l2"
    scale: str = "component"
    gauge: str | None = None
    refit: bool = True
    average_bits: float | None = None
    base: str | None = None
    of: str | None = None  # an input; by default what the step before made, or the only input

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"quantize_adapter: {problem}" for problem in self._options().problems())
        yield from (f"quantize_adapter: {problem}" for problem in not_inputs([name for name in (self.base, self.of) if name], inputs))
        if (self.base is None) != (self.text is None):
            yield "quantize_adapter: to distil, give both a text and the base that the adapter was trained on"

    def _options(self) -> Any:
        from quant.adapters.plan import QuantizeOptions

        return QuantizeOptions(self.bits, self.codebook, self.scale, self.gauge, self.refit, self.average_bits)  # type: ignore[arg-type]  # which its `problems` says

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.adapters.container import expanded, is_packed
        from quant.adapters.plan import quantize_adapter
        from quant.adapters.train import RELATIVE_LR

        from .adapters import read_adapter

        others = {name: source for name, source in inputs.items() if name != self.base}
        adapter = inputs[self.of] if self.of else only_input(others, previous, "quantize_adapter")
        adapter = expanded(adapter) if is_packed(adapter) else adapter
        base = inputs[self.base] if self.base else None
        lesson = self.lesson(base, how, RELATIVE_LR) if base else None
        return self.told(quantize_adapter(read_adapter(adapter), self._options(), base, lesson), lesson)


class TrainAdapterStep(LessonStep):
    """`train_adapter:` — a LoRA adapter trained for few bits from scratch."""

    base: str
    bits: int = 1
    rank: int = 8
    codebook: str = "l2"
    scale: str = "component"
    target: list[str] = Field(default_factory=list)
    alpha: float = 2.0

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"train_adapter: {problem}" for problem in [*not_inputs([self.base], inputs), *self._options().problems()])
        if self.text is None:
            yield "train_adapter: give it a text to train on"

    def _options(self) -> Any:
        from quant.adapters.train import TrainAdapterOptions

        return TrainAdapterOptions(self.bits, self.rank, self.codebook, self.scale, tuple(self.target), self.alpha)  # type: ignore[arg-type]

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.adapters.train import LR, train_adapter

        lesson = self.lesson(inputs[self.base], how, LR)
        return self.told(train_adapter(inputs[self.base], lesson, self._options()), lesson)


class DeltaStep(LessonStep):
    """`delta:` — the difference of a fine-tune at one bit a weight (BitDelta); its scales distilled, with a text."""

    base: str
    tuned: str
    bits: int = 1
    scale: str = "tensor"
    save_rest: bool = True
    exclude: list[str] = Field(default_factory=list)

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"delta: {problem}" for problem in [*not_inputs((self.base, self.tuned), inputs), *self._options().problems()])

    def _options(self) -> Any:
        from quant.adapters.delta import DeltaOptions

        return DeltaOptions(self.bits, self.scale, self.save_rest, tuple(self.exclude))  # type: ignore[arg-type]

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.adapters.delta import delta
        from quant.adapters.train import RELATIVE_LR

        base, tuned = inputs[self.base], inputs[self.tuned]
        lesson = self.lesson(tuned, how, RELATIVE_LR)
        return self.told(delta(base, tuned, self._options(), lesson), lesson)


class QuantizeStep(BaseModel):
    """`quantize:` — the keys beside these are options of the quantiser."""

    model_config = ConfigDict(extra="allow")

    bits: int | None = None  # of every layer; or else `scheme`, or `allocation`
    group_size: int = 128
    symmetric: bool = True
    scheme: str | None = None  # W8A8, FP8, FP8_BLOCK, NVFP4 or MXFP4
    allocation: list[GroupScheme] | None = None  # the scheme of each group of layers; a file of `compress allocate` is read when the recipe is
    method: str = "rtn"
    format: str | None = None  # the scheme's own; pack-quantized for bits
    exclude: list[str] = Field(default_factory=list)
    include: list[str] = Field(default_factory=list)
    calibration: CalibrationOptions | None = None  # a text, for methods that look at the inputs of layers
    norm_passes: int = Field(0, ge=0)  # over the text, in which the norms of each block are tuned
    biases: bool = False  # correct those of quantised layers
    moments: str | None = None  # in place of a text, an input: what `compress calibrate` wrote
    rotate: bool = False  # write the residual stream in another basis first
    of: str | None = None  # an input; by default what the step before made, or the only input

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from quant.plan import preset_problems, problems

        given, options = (self.calibration is not None) + (self.moments is not None), self.model_extra or {}
        if sum(way is not None for way in (self.bits, self.scheme, self.allocation)) != 1:
            yield "quantize: give bits, or a scheme by its name (W8A8, FP8, FP8_BLOCK, NVFP4, MXFP4), or an allocation: one of these"
        elif self.bits is None and (self.group_size, self.symmetric) != (128, True):
            own = "an allocation says the group size and the symmetry of each layer" if self.allocation else f"{self.scheme} has groups of its own"
            yield f"quantize: {own}; leave group_size and symmetric out"
        elif self.scheme is not None:
            yield from (f"quantize: {problem}" for problem in preset_problems(self.scheme, self.method, self.format, options, given > 0))
        else:
            bits = 4 if self.bits is None else self.bits
            found = problems(bits, self.group_size, self.symmetric, self.method, self.format or "pack-quantized", options, given > 0)
            yield from (f"quantize: {problem}" for problem in found)
        if given > 1:
            yield "quantize: give a calibration text, or moments that were measured on one, not both"
        if (self.norm_passes or self.biases) and self.calibration is None:
            yield "quantize: norms and biases are tuned while a text flows through the model: give norm_passes and biases with calibration"
        if self.rotate and self.moments is not None:
            yield "quantize: moments were measured on the model as it was; a rotated one needs a calibration text"
        named = [name for name in (self.of, self.moments) if name is not None]
        yield from (f"quantize: {problem}" for problem in not_inputs(named, inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.bits_file import schemes_of
        from quant.calibrated import Calibration
        from quant.formats import AnyScheme
        from quant.plan import PRESETS, quantize
        from quant.quantized import Scheme
        from quant.rotate import rotate

        source = inputs[self.of] if self.of else only_input({name: model for name, model in inputs.items() if name != self.moments}, previous, "quantize")
        source = rotate(source) if self.rotate else source
        scheme: AnyScheme | Mapping[str, AnyScheme]
        scheme, layout = PRESETS[self.scheme] if self.scheme else (Scheme(self.bits or 4, self.group_size, self.symmetric), "pack-quantized")
        if self.allocation is not None:
            scheme = schemes_of(self.allocation, source)
        calibration: Calibration | None = None
        notes: list[str] = []
        if self.moments is not None:
            calibration = Calibration(moments=inputs[self.moments])
        elif self.calibration is not None:
            ids, notes = self.calibration.placed(how.folder).read(source)
            calibration = Calibration(ids, order=self.calibration.order, norm_passes=self.norm_passes, biases=self.biases)
        result = quantize(
            source, scheme, self.method, self.model_extra or {}, self.format or layout, exclude=tuple(self.exclude), include=tuple(self.include),
            device=how.device, allow_nonfinite=how.save.allow_nonfinite, calibration=calibration,
        )  # fmt: skip
        return replace(result, notes=(*result.notes, *notes))


class CalibrateStep(Strict):
    """`calibrate:` — the moments of the inputs of linear layers on a text."""

    text: CalibrationOptions
    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        if self.of is not None:
            yield from (f"calibrate: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from .calibration.statistics import calibrate

        source = inputs[self.of] if self.of else only_input(inputs, previous, "calibrate")
        text = self.text.placed(how.folder)
        ids, notes = text.read(source)
        made = calibrate(source, ids, {"seed": text.seed, "sha256": text.digests()}, how.device)
        return replace(made, notes=(*made.notes, *notes))


class DequantizeStep(Strict):
    """`dequantize:` — packed weights back to dense ones."""

    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        if self.of is not None:
            yield from (f"dequantize: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.plan import dequantize

        return dequantize(inputs[self.of] if self.of else only_input(inputs, previous, "dequantize"))


class ConvertStep(Strict):
    """`convert:` — packed weights in another format, their codes as they are."""

    to: str
    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from quant import FORMATS

        if self.to not in list(FORMATS):
            yield f"convert: unknown format '{self.to}'.{nearest(self.to, FORMATS)}"
        if self.of is not None:
            yield from (f"convert: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.convert import convert

        return convert(inputs[self.of] if self.of else only_input(inputs, previous, "convert"), self.to)


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

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _granularity_alone(cls, value: object) -> object:
        return {"granularity": value} if isinstance(value, str) else value

    @field_validator("pattern", mode="before")
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

        source = inputs[self.of] if self.of else only_input({name: model for name, model in inputs.items() if name != self.mask}, previous, "prune")
        options = PruneOptions(tuple(self.exclude), tuple(self.include), self.seed, how.device, how.save.allow_nonfinite)
        if self.mask is not None:
            return apply_masks(source, inputs[self.mask], options)
        ids, notes = self.calibration.placed(how.folder).read(source) if self.calibration else (None, [])
        if self.structured is not None:
            result = shrink(source, self.structured) if ids is None else shrink_on(source, ids, self.structured, options)
        else:
            asked = Sparsity.of(self.sparsity, self.pattern), self.method, self.scope, self.model_extra or {}, options
            if self.allocate and ids is not None:
                from .sparsities import prune_allocated

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
    tune_lr: bool = False
    allow_densify: bool = False
    of: str | None = None

    @field_validator("train", mode="before")
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

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune.retrain import HELD_OUT, RetrainOptions, retrain, split_options

        training, variant_options, _ = split_options(self.model_extra or {}, self.train)
        source = inputs[self.of] if self.of else only_input(inputs, previous, "retrain")
        rows = lesson_rows(self.text, training.steps * training.batch + HELD_OUT, source, how)
        options = RetrainOptions(
            tuple(self.train), rows, variant_options, training, distill=self.distill, tune_lr=self.tune_lr, allow_densify=self.allow_densify, device=how.device,
        )  # fmt: skip
        made = retrain(source, options, inputs[self.teacher] if self.teacher else None)
        return with_lesson(made, training.steps, training.batch, rows)


class FoldStep(Strict):
    """`fold:` — fewer blocks, and blocks that share their linear weights."""

    remove: float = 0  # a share of the blocks, or a number of them; which ones is found on the text, unless `keep` says it
    keep: list[int] | None = None  # the blocks that stay, in order
    by: str = "leave-one-out"
    pinned: list[int] = Field(default_factory=list)  # blocks that stay whatever is found
    share: int = Field(default=1, ge=1)  # neighbours in a group
    parent: Literal["first", "average"] = "first"
    calibration: CalibrationOptions | None = None
    scores: list[float] | None = None  # how much each block counts, where that was found
    of: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be found out which blocks go."""
        return self.remove > 0 and self.keep is None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from prune.fold import SCORES

        if self.keep is None and not self.remove and self.share == 1:
            yield "fold: say how many blocks to remove, or which to keep, or how many are to share"
        if self.keep is not None and self.remove and self.scores is None:
            yield "fold: keep says which blocks stay; leave remove out"
        if self.by not in SCORES:
            yield f"fold: unknown importance '{self.by}'.{nearest(self.by, SCORES)}"
        if self.is_open and self.calibration is None:
            yield "fold: which blocks go is found on a text: give one with --calibration FILE, or the blocks that stay with --keep"
        if self.of is not None:
            yield from (f"fold: {problem}" for problem in not_inputs([self.of], inputs))

    def found(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> FoldStep:
        """The same step with the blocks that stay."""
        from prune.fold import find

        source = inputs[self.of] if self.of else only_input(inputs, previous, "fold")
        assert self.calibration is not None
        rows, _ = self.calibration.placed(how.folder).read(source)
        found = find(
            source, rows, self.remove, self.by, pinned=self.pinned, seed=self.calibration.seed, device=how.device, progress=how.save.progress
        )  # fmt: skip
        how.save.progress.tell(f"fold: {self.by} takes out {', '.join(map(str, found.removed))} of the blocks 0 to {len(found.scores) - 1}")
        return self.model_copy(update={"keep": list(found.kept), "scores": [round(score, 6) for score in found.scores]})

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from prune.fold import Fold, count_of, folded, stack_of

        source = inputs[self.of] if self.of else only_input(inputs, previous, "fold")
        blocks = len(stack_of(source).layers)
        keep = self.keep if self.keep is not None else range(blocks - count_of(self.remove, blocks))  # as many as there will be
        return folded(source, Fold.of(keep, self.share, self.parent))


class MergekitStep(RootModel[Any]):
    """`mergekit:` — a document in mergekit's schema, or a list of them; the models that they name are inputs."""

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from .mergekit import read

        found = read(self.root)
        yield from (f"mergekit: {problem}" for problem in [*found.problems, *not_inputs(found.models, inputs)])

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from .mergekit import compose, read

        return compose(read(self.root).documents, inputs, MergeOptions(device=how.device, allow_nonfinite=how.save.allow_nonfinite))


class MoeStep(MoeConfig):
    """`moe:` — a mixture of experts from dense models."""

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"moe: {problem}" for problem in not_inputs(self.models, inputs))
        for conflict in self.conflicts():
            yield f"moe: {conflict}"

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from .moe.plan import moe

        return moe(inputs, self)


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
}
TEXT_KEYS = ("calibration", "text")  # of steps, as the flags of commands: what methods look at; what trains, or is measured on
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


def with_allocations(steps: Sequence[object], folder: Path) -> tuple[list[object], list[str]]:
    """Steps whose allocation is a file, relative to `folder`, with what the file holds in its place; and a sentence for each that cannot be read."""
    done, found = list(steps), []
    for number, step in enumerate(steps, 1):
        options = step.get("quantize") if isinstance(step, dict) else None
        if isinstance(options, dict) and isinstance(options.get("allocation"), str):
            try:
                groups = read_allocation(folder / Path(options["allocation"]).expanduser())
            except CompressError as error:
                found.append(f"step {number}, quantize: allocation: {error}")
                groups = []
            done[number - 1] = {"quantize": {**options, "allocation": [group.model_dump() for group in groups]}}
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
    return found


def schema_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem of a validation as `place: what`, with the nearest known key for an unknown one."""
    found = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"][:-1]))
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            known = _model_at(model, problem["loc"][:-1]).model_fields
            found.append(f"{place + ': ' if place else ''}unknown key '{key}'.{nearest(key, known)}")
        else:
            found.append(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}")
    return list(dict.fromkeys(found))


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The schema that holds at a place: through fields, and through the items of lists and tables."""
    annotation: Any = model
    for part in place:
        known = _model_in(annotation)
        if known is not None and part in known.model_fields:
            annotation = known.model_fields[str(part)].annotation
    return _model_in(annotation) or model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first schema in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)


def only_input(inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, operation: str) -> Checkpoint:
    if previous is not None:
        return previous
    if len(inputs) == 1:
        return next(iter(inputs.values()))
    raise RecipeError(f"{operation}: say which input it works on, with `of:`; there are {len(inputs)}")


def _dtype_problems(operation: str, *dtypes: str | None) -> Iterator[str]:
    for dtype in dtypes:
        try:
            if dtype:
                parse_float_dtype(dtype)
        except OptionError as error:
            yield f"{operation}: {error}"


def _default_of(method: str, name: str) -> Any:
    option = METHODS[method].options.table.get(name)
    default = option.default if option else None
    return default[0] if isinstance(default, tuple) else default
