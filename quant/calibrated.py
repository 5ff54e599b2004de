"""Quantisation that looks at the inputs of a layer: block after block while a text flows through the model, or from moments measured before.

Block by block, each block's inputs are what the quantised blocks before it yield, so that errors are made up for rather than added up. From saved
moments, which are those of the model as it was, every layer stands alone, and the plan streams as one that needs no text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_plus.calibration import Block, walk
from mergekit_plus.calibration.statistics import MomentsFile
from mergekit_plus.calibration.walk import memory
from mergekit_plus.checkpoint import Checkpoint, Step, copy_step
from mergekit_plus.checkpoint.deferred import Deferred, Work
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.errors import OptionError
from mergekit_plus.model import ModelMap
from mergekit_plus.moments import Moments

from .inner import Inner, inner_parameters
from .layer import UNSEEN, Layer, Rows
from .norms import tweak_norms
from .quantized import dequantize
from .quantizer import QUANTIZERS, Quantizer
from .tuning import bias_correction, centred

Order = Literal["block", "layer"]
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Calibration:
    """What a calibrated quantiser learns of the inputs of layers from: `ids`, int64 [windows, window], or `moments` measured before.

    order: whether a block's layers are measured once, before any of them is quantised, or those behind others again after these were ("layer").
    cross: aim at the outputs of the model that nothing was done to, which flows along: twice the time and the memory of a block.
    norm_passes: passes over the text in which each block's norms are tuned, after its layers were quantised; the model flows along for these too.
    biases: whether to correct the biases of quantised layers, so that the means of their outputs are right, and to quantise by the covariance of the inputs.
    """

    ids: Tensor | None = None
    moments: Checkpoint | None = None
    order: Order = "block"
    cross: bool = False
    norm_passes: int = 0
    biases: bool = False


def calibration_problem(quantizer: Quantizer, given: bool) -> str | None:
    """What is wrong with a calibration that is given, or is not."""
    if quantizer.calibrated and not given:
        return f"{quantizer.name} looks at the inputs of layers: give a text with --calibration FILE, or --moments FILE from `compress calibrate`"
    if given and not quantizer.calibrated:
        others = ", ".join(name for name in QUANTIZERS if QUANTIZERS[name].calibrated)
        return f"{quantizer.name} looks at weights only and needs no calibration; methods that use one: {others}"
    return None


def tuned_parameters(
    checkpoint: Checkpoint, roles: ModelMap, layers: Collection[str], free: Sequence[str], calibration: Calibration | None
) -> dict[str, Inner]:
    """The norms of the blocks, and the biases of these layers, that the calibration is to change; of those tensors that are `free` to be, in their order."""
    biases = {f"{name.removesuffix('weight')}bias" for name in layers} if calibration and calibration.biases else set()
    norms = calibration is not None and calibration.norm_passes
    found = inner_parameters(checkpoint, roles, free)
    return {name: inner for name, inner in found.items() if (inner.role == "norm" and norms) or (inner.role == "bias" and name in biases)}


def steps_for(
    checkpoint: Checkpoint, roles: ModelMap, layers: Sequence[Layer], tuned: Mapping[str, Inner], calibration: Calibration, device: str
) -> tuple[list[Step], list[str]]:
    """The steps that quantise these layers and change these norms and biases, and notes on how, and on layers that are rounded to nearest.

    Errors: OptionError without a text or moments; CheckpointError for moments that are another model's.
    """
    if tuned and calibration.ids is None:
        raise OptionError("norms and biases are tuned while a text flows through the model: give a text, not moments")
    if calibration.biases and calibration.cross:
        raise OptionError("biases are corrected for the inputs as they are, not with `cross`")
    notes: list[str] = []
    if calibration.moments is not None:
        known = MomentsFile(calibration.moments)
        known.check(checkpoint)
        seen = [layer for layer in layers if layer.name in known]
        steps = [Step(((checkpoint, layer.name), *known.reads(layer.name)), layer.writes, _FromMoments(layer, device)) for layer in seen]
    else:
        seen = [layer for layer in layers if in_walk(roles, layer.name)]
        walking = memory(checkpoint, roles, calibration.cross or calibration.norm_passes > 0)
        made = block_by_block(checkpoint, seen, tuned, calibration, walking, device)
        steps = [copy_step(made, name) for name in made.specs]
        assert calibration.ids is not None
        windows, window = calibration.ids.shape
        notes.append(f"{len(roles.blocks)} blocks, one after another, on {windows} windows of {window} tokens")
    names = {layer.name for layer in seen}
    rest = [layer for layer in layers if layer.name not in names]
    steps += [Step(((checkpoint, layer.name),), layer.writes, Rows(layer, device), layer.method.layout.row_unit(layer.scheme)) for layer in rest]
    if rest:
        notes.append(f"{len(rest)} layer{'s' * (len(rest) > 1)} ('{rest[0].name}'): {UNSEEN}")
    return steps, notes


def in_walk(roles: ModelMap, name: str) -> bool:
    """Whether a weight stands in the blocks through which a text can flow."""
    meaning = roles.tensors[name]
    return meaning.block is not None and meaning.stack == roles.stack and meaning.parameter is not None


def block_by_block(
    checkpoint: Checkpoint, layers: Sequence[Layer], tuned: Mapping[str, Inner], calibration: Calibration, memory: int, device: str
) -> Checkpoint:
    """What the weights, and norms and biases, of the blocks become while the text flows through: all that is written for them, computed when it is first read.

    memory: what the walk takes; a quantiser takes some copies of a weight and its Gram matrix more.
    """
    wanted = {layer.name: layer for layer in layers}
    assert calibration.ids is not None
    ids = calibration.ids

    def compute(work: Work) -> None:
        notes: dict[str, list[str]] = {}

        def process(block: Block) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, moments in _measured(block, [name for name in block.names if name in wanted], calibration):
                layer, weight = wanted[name], block.weights.get(name)
                stored = checkpoint.read(name).to(device) if weight is None else weight.to(TORCH_DTYPES[layer.spec.dtype])
                bias = tuned.get(f"{name.removesuffix('weight')}bias")
                quantized = layer.quantize(stored, centred(moments) if bias and moments else moments)
                found |= layer.encode(quantized)
                if bias:
                    parameter = block.module.get_parameter(bias.inside)
                    corrected = parameter + (bias_correction(stored, quantized, moments) if moments else 0)
                    found[bias.spec.name] = corrected.to("cpu", TORCH_DTYPES[bias.spec.dtype])
                    parameter.copy_(found[bias.spec.name])
                if weight is not None:  # `stored` may be this very tensor
                    weight.copy_(dequantize(quantized))
                if quantized.note:
                    notes.setdefault(quantized.note, []).append(name)
            norms = {name: tuned[name] for name in block.names if name in tuned and tuned[name].role == "norm"}
            return found | tweak_norms(block, norms, calibration.norm_passes)

        walk(checkpoint, ids, process, work, cross=calibration.cross or calibration.norm_passes > 0, device=device)
        for note, names in notes.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{checkpoint.label}: {names[0]}{more}: {note}", stacklevel=2)

    solving = max((40 * layer.spec.numel + 40 * layer.spec.shape[1] ** 2 for layer in layers), default=0)
    made = [*(write for layer in layers for write in layer.writes), *(inner.spec for inner in tuned.values())]
    return Checkpoint(f"{checkpoint.label}, calibrated", Deferred(made, [checkpoint], compute, memory=memory + solving))


def _measured(block: Block, names: Sequence[str], calibration: Calibration) -> Iterator[tuple[str, Moments | None]]:
    """Each weight with the moments of its inputs; with the order "layer", those that are measured again see what was done to the weights before them."""
    left = list(names)
    while left:
        moments = block.moments(left, calibration.cross)
        stage = left if calibration.order == "block" else _first_stage(moments, left)
        for name in stage:
            yield name, moments.get(name)
        left = [name for name in left if name not in stage]


def _first_stage(moments: Mapping[str, Moments], names: Sequence[str]) -> list[str]:
    """The weights whose input is that of the first which the block applies; so are the same ones of other experts."""
    first = next(iter(moments.values()), None)
    alike = {_DIGITS.sub("*", name) for name, own in moments.items() if own is first}
    return [name for name in names if _DIGITS.sub("*", name) in alike or name not in moments] or list(names)


class _FromMoments:
    """Quantise and encode a weight by moments measured before."""

    def __init__(self, layer: Layer, device: str) -> None:
        self.layer, self.device = layer, device

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        weight, gram, mean, tokens = (tensor.to(self.device) for tensor in tensors)
        with torch.no_grad():
            quantized = self.layer.quantize(weight, Moments(gram, mean, int(tokens)))
            return list(self.layer.encode(quantized).values())
