"""Steps that quantise a model, and undo or restate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from quant.bits_file import GroupScheme

from ..calibration.options import CalibrationOptions
from ..checkpoint import Checkpoint
from ..errors import nearest, not_inputs
from .base import Execution, Strict, moments_of, source_of


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

        source = source_of(self.of, inputs, previous, "quantize", aside=self.moments)
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
        return moments_of(self.text, source_of(self.of, inputs, previous, "calibrate"), how)


class DequantizeStep(Strict):
    """`dequantize:` — packed weights back to dense ones."""

    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        if self.of is not None:
            yield from (f"dequantize: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.plan import dequantize

        return dequantize(source_of(self.of, inputs, previous, "dequantize"))


class ConvertStep(Strict):
    """`convert:` — packed weights in another format, their codes as they are."""

    to: str
    of: str | None = None

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from quant import FORMATS

        if self.to not in FORMATS:
            yield f"convert: unknown format '{self.to}'.{nearest(self.to, FORMATS)}"
        if self.of is not None:
            yield from (f"convert: {problem}" for problem in not_inputs([self.of], inputs))

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from quant.convert import convert

        return convert(source_of(self.of, inputs, previous, "convert"), self.to)
