"""Quantisation that looks at the inputs of a layer: block after block while a text flows through the model, or from moments measured before.

Block by block, each block's inputs are what the quantised blocks before it yield, so that errors are made up for rather than added up. From saved
moments, which are those of the model as it was, every layer stands alone, and the plan streams as one that needs no text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from mergekit_plus.model import ModelMap
from mergekit_plus.moments import Moments

from .layer import UNSEEN, Layer, Rows
from .quantized import Quantized, dequantize
from .quantizer import QUANTIZERS, Quantizer

Order = Literal["block", "layer"]
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Calibration:
    """What a calibrated quantiser learns of the inputs of layers from: `ids`, int64 [windows, window], or `moments` measured before.

    order: whether a block's layers are measured once, before any of them is quantised, or those behind others again after these were ("layer").
    cross: aim at the outputs of the model that nothing was done to, which flows along: twice the time and the memory of a block.
    """

    ids: Tensor | None = None
    moments: Checkpoint | None = None
    order: Order = "block"
    cross: bool = False


def calibration_problem(quantizer: Quantizer, given: bool) -> str | None:
    """What is wrong with a calibration that is given, or is not."""
    if quantizer.calibrated and not given:
        return f"{quantizer.name} looks at the inputs of layers: give a text with --calibration FILE, or --moments FILE from `compress calibrate`"
    if given and not quantizer.calibrated:
        others = ", ".join(name for name in QUANTIZERS if QUANTIZERS[name].calibrated)
        return f"{quantizer.name} looks at weights only and needs no calibration; methods that use one: {others}"
    return None


def steps_for(checkpoint: Checkpoint, roles: ModelMap, layers: Sequence[Layer], calibration: Calibration, device: str) -> tuple[list[Step], list[str]]:
    """The steps that quantise these layers, and notes on those that are rounded to nearest.

    Errors: OptionError without a text or moments; CheckpointError for moments that are another model's.
    """
    if calibration.moments is not None:
        known = MomentsFile(calibration.moments)
        known.check(checkpoint)
        seen = [layer for layer in layers if layer.name in known]
        steps = [Step(((checkpoint, layer.name), *known.reads(layer.name)), layer.writes, _FromMoments(layer, device)) for layer in seen]
    else:
        seen = [layer for layer in layers if in_walk(roles, layer.name)]
        made = block_by_block(checkpoint, seen, calibration, memory(checkpoint, roles), device)
        steps = [copy_step(made, name) for name in made.specs]
    rest = [layer for layer in layers if layer not in seen]
    steps += [Step(((checkpoint, layer.name),), layer.writes, Rows(layer, device), layer.method.layout.row_unit(layer.scheme)) for layer in rest]
    return steps, [f"{len(rest)} layers ('{rest[0].name}'): {UNSEEN}"] if rest else []


def in_walk(roles: ModelMap, name: str) -> bool:
    """Whether a weight stands in the blocks through which a text can flow."""
    meaning = roles.tensors[name]
    return meaning.block is not None and meaning.stack == roles.stack and meaning.parameter is not None


def block_by_block(checkpoint: Checkpoint, layers: Sequence[Layer], calibration: Calibration, memory: int, device: str) -> Checkpoint:
    """What the weights of the blocks become while the text flows through: all that is written for them, computed when it is first read.

    memory: what the walk takes; a quantiser takes some copies of a weight and its Gram matrix more.
    """
    wanted = {layer.name: layer for layer in layers}
    ids = calibration.ids
    assert ids is not None

    def compute(work: Work) -> None:
        notes: dict[str, list[str]] = {}

        def process(block: Block) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, moments in _measured(block, [name for name in block.names if name in wanted], calibration):
                layer, weight = wanted[name], block.weights.get(name)
                stored = checkpoint.read(name).to(device) if weight is None else weight.to(TORCH_DTYPES[layer.spec.dtype])
                quantized = layer.quantize(stored, moments)
                assert isinstance(quantized, Quantized)  # floats are rounded without a text
                found |= layer.encode(quantized)
                if weight is not None:
                    weight.copy_(dequantize(quantized))
                if quantized.note:
                    notes.setdefault(quantized.note, []).append(name)
            return found

        walk(checkpoint, ids, process, work, cross=calibration.cross, device=device)
        for note, names in notes.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{checkpoint.label}: {names[0]}{more}: {note}", stacklevel=2)

    solving = max((20 * layer.spec.numel + 40 * layer.spec.shape[1] ** 2 for layer in layers), default=0)
    deferred = Deferred([write for layer in layers for write in layer.writes], [checkpoint], compute, memory=memory + solving)
    return Checkpoint(f"{checkpoint.label}, calibrated", deferred)


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
