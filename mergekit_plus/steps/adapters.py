"""Steps that make adapters, and differences of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import parse_float_dtype
from ..errors import CheckpointError, not_inputs
from ..merge.plan import MergeOptions
from ..model import adapter_reason
from .base import Execution, Strict, dtype_problems, lesson_rows, moments_of, source_of, with_lesson
from .merging import MergeStep


class MergeAdaptersStep(MergeStep):
    """`merge_adapters:` — as `merge:`, of inputs that are adapters of one base."""

    rank: int | None = None

    def options(self) -> dict[str, Any]:
        from ..merge.adapters import SVD

        return MergeStep.options(self.model_copy(update={"method": "linear"}) if self.method == SVD else self)

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from ..merge.adapters import adapter_problems

        yield from (f"merge_adapters: {problem}" for problem in not_inputs(self.models, inputs))
        for key in ("base", "exclude", "include", "input_dtype", "tokenizer", "search"):
            if getattr(self, key):
                yield f"merge_adapters: '{key}' is for models; adapters are merged without"
        for problem in adapter_problems(self.method, self.options(), len(self.models), self.rank):
            yield f"merge_adapters: {problem}"
        yield from dtype_problems("merge_adapters", self.dtype)

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from ..adapters import read_adapter
        from ..merge.adapters import merge_adapters

        options = MergeOptions(
            parse_float_dtype(self.dtype) if self.dtype else None, seed=self.seed, device=how.device, allow_nonfinite=how.save.allow_nonfinite
        )
        return merge_adapters([read_adapter(inputs[name]) for name in self.models], self.method, self.options(), self.rank, options)


class ExtractAdapterStep(Strict):
    """`extract_adapter:` — the LoRA adapter that makes one input of another; with a text, the one that is best for what it makes of the text."""

    base: str
    tuned: str
    rank: int | None = None
    energy: float | None = None
    exclude: list[str] = Field(default_factory=list)
    save_rest: bool = False
    dtype: str = "float32"
    calibration: CalibrationOptions | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from ..adapters.extract import ExtractOptions

        yield from (f"extract_adapter: {problem}" for problem in not_inputs((self.base, self.tuned), inputs))
        for problem in ExtractOptions(self.rank, self.energy).problems(calibrated=self.calibration is not None):
            yield f"extract_adapter: {problem}"
        yield from dtype_problems("extract_adapter", self.dtype)

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from ..adapters.extract import ExtractOptions, extract

        options = ExtractOptions(self.rank, self.energy, tuple(self.exclude), self.save_rest, parse_float_dtype(self.dtype))
        moments = moments_of(self.calibration, inputs[self.tuned], how) if self.calibration else None
        made = extract(inputs[self.base], inputs[self.tuned], options, how.save.progress, moments)
        return replace(made, notes=moments.notes) if moments else made


class LessonStep(Strict):
    """A step that may train on a text: for so many steps of so many windows, at a rate that has a default of its own."""

    text: CalibrationOptions | None = None
    steps: int = 200
    batch: int = 4
    lr: float | None = None
    autocast: bool = False
    seed: int = 0

    def lesson(self, model: Checkpoint, how: Execution, lr: float) -> Any:
        """What it trains on, None where it names no text: at least as many windows as its steps read, where the text has so many."""
        from quant.adapters.train import HELD_OUT, Lesson

        from ..training import TrainOptions

        if self.text is None:
            return None
        if reason := adapter_reason(model):
            raise CheckpointError(reason)
        ids = lesson_rows(self.text, self.steps * self.batch + HELD_OUT, model, how)
        rate = lr if self.lr is None else self.lr
        training = TrainOptions(self.steps, rate, self.batch, schedule="cosine", warmup=0.05, clip=None, seed=self.seed, autocast=self.autocast)
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
    distill: float = 1.0
    base: str | None = None
    of: str | None = None  # an input; by default what the step before made, or the only input

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"quantize_adapter: {problem}" for problem in self._options().problems())
        yield from (f"quantize_adapter: {problem}" for problem in not_inputs([name for name in (self.base, self.of) if name], inputs))
        if (self.base is None) != (self.text is None):
            yield "quantize_adapter: to distil, give both a text and the base that the adapter was trained on"

    def _options(self) -> Any:
        from quant.adapters.plan import QuantizeOptions

        return QuantizeOptions(self.bits, self.codebook, self.scale, self.gauge, self.refit, self.average_bits, self.distill)  # type: ignore[arg-type]  # which its `problems` says

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.adapters.container import expanded, is_packed
        from quant.adapters.plan import quantize_adapter
        from quant.adapters.train import RELATIVE_LR

        from ..adapters import read_adapter

        adapter = source_of(self.of, inputs, previous, "quantize_adapter", aside=self.base)
        adapter = expanded(adapter) if is_packed(adapter) else adapter
        base = inputs[self.base] if self.base else None
        lesson = self.lesson(base, how, RELATIVE_LR) if base else None
        return self.told(quantize_adapter(read_adapter(adapter), self._options(), base, lesson), lesson)


class Pools(Strict):
    """`pools:` of `train_adapter` — what modules of a kind share."""

    rank: int
    private: int = 1
    shards: int = 4


class TrainAdapterStep(LessonStep):
    """`train_adapter:` — a LoRA adapter trained from scratch, for few bits or as it is."""

    base: str
    bits: int = 1
    rank: int = 8
    codebook: str = "l2"
    scale: str = "component"
    target: list[str] = Field(default_factory=list)
    alpha: float = 2.0
    init: str = "lora"
    calibration: CalibrationOptions | None = None  # whose inputs CorDA looks at
    budget: int | None = None
    pools: Pools | None = None
    neurons: int | None = None  # beside those of every MLP, in place of a LoRA

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        found = [*not_inputs([self.base], inputs), *self._options().problems(calibrated=self.calibration is not None)]
        if self.neurons is not None:
            found += self._neurons().problems()
            if self.target or self.init != "lora" or self.budget is not None or self.pools is not None:
                found.append("neurons stand beside those of every MLP; target, init, budget and pools are for LoRA")
        yield from (f"train_adapter: {problem}" for problem in dict.fromkeys(found))
        if self.text is None:
            yield "train_adapter: give it a text to train on"

    def _options(self) -> Any:
        from quant.adapters.pools import Sharing
        from quant.adapters.scratch import TrainAdapterOptions

        pools = Sharing(**self.pools.model_dump()) if self.pools else None
        own = (self.bits, self.rank, self.codebook, self.scale, tuple(self.target), self.alpha, self.init, self.budget, pools)
        return TrainAdapterOptions(*own)  # type: ignore[arg-type]

    def _neurons(self) -> Any:
        from quant.adapters.neurons import NeuronOptions

        return NeuronOptions(self.neurons or 0, self.bits, self.codebook, self.scale)  # type: ignore[arg-type]

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.adapters.neurons import train_neurons
        from quant.adapters.principal import RATES
        from quant.adapters.scratch import LR, train_adapter

        base = inputs[self.base]
        lesson = self.lesson(base, how, RATES.get(self.init, LR))
        if self.neurons is not None:
            return self.told(train_neurons(base, lesson, self._neurons()), lesson)
        moments = moments_of(self.calibration, base, how) if self.calibration else None
        return self.told(train_adapter(base, lesson, self._options(), moments, how.save.progress), lesson)


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
