"""A fine-tune as its base and one bit a weight: BitDelta (Liu et al., arXiv 2402.10193).

Each linear weight's difference becomes `scale * sign`, one scale for the weight or one for each row; at one bit the best scale is the mean of
|difference|. What is no linear weight and changed (embeddings, norms, head) is stored whole, as their code does, or left as the base has it. With
a text, the scales alone are then trained to give the fine-tune's logits (mean squared error), as theirs are; here a learning rate is relative
to the scale that training starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mergekit_plus.adapters.difference import add_difference
from mergekit_plus.adapters.extract import pairs_of, squares_of
from mergekit_plus.checkpoint import Checkpoint, Deferred, Plan, Step, TensorSpec, Work, copy_step
from mergekit_plus.checkpoint.folder import DELTA_QUANT
from mergekit_plus.checkpoint.spec import matches
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe

from .coding import Coded, Coding, decode, encode, levels_of, nearest
from .container import Entry, apart_specs, apart_tensors, expanded, levels_step, sidecar
from .train import Lesson, memory_of, refuse_failure

BLOCK = 1 << 20  # elements that are coded at once


@dataclass(frozen=True)
class DeltaOptions:
    """How a difference is coded, and what becomes of what is no linear weight."""

    bits: int = 1
    scale: Literal["tensor", "row"] = "tensor"
    rest: bool = True  # store what else changed whole
    exclude: tuple[str, ...] = ()

    @property
    def coding(self) -> Coding:
        """Errors: OptionError."""
        if self.scale not in ("tensor", "row"):
            raise OptionError(f"scale={self.scale!r}: tensor or row")
        return Coding(self.bits, "l2", "tensor" if self.scale == "tensor" else "component")

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        try:
            _ = self.coding
        except OptionError as error:
            return [str(error)]
        return []


def delta(base: Checkpoint, tuned: Checkpoint, options: DeltaOptions, lesson: Lesson | None = None) -> Checkpoint:
    """The packed difference that makes `tuned` of `base`: BASE+DIFFERENCE is the model again, as nearly as the bits allow.

    Reads what is no linear weight of both before it returns, to see what changed. Errors: OptionError for impossible options; CheckpointError where the
    models do not fit together, or there are no linear weights.
    """
    if found := options.problems() + (lesson.problems() if lesson else []):
        raise OptionError("; ".join(found))
    pairs, coding, roles = pairs_of(base, tuned, options.exclude), options.coding, describe(base).tensors
    kept = {name: place for name, place in pairs.items() if not matches(name, options.exclude)}
    coded = {name: place for name, place in kept.items() if place in roles and roles[place].role == "linear" and len(tuned.specs[name].shape) == 2}
    if not coded:
        raise CheckpointError(f"{tuned.label} has no linear weights to take the difference of")
    entries = [Entry(name, "F32", tuned.specs[name].shape, 0, coding) for name in coded]
    rest = [name for name, place in kept.items() if name not in coded and options.rest and squares_of([(base, place), (tuned, name)])[0]]
    files = {DELTA_QUANT: sidecar(entries, base=base.ref)}
    copies = [copy_step(tuned, name) for name in rest]

    def packed(scales: Checkpoint | None) -> Checkpoint:
        steps = [_step(entry, base, coded[entry.name], tuned, scales) for entry in entries]
        return Checkpoint(f"difference of {tuned.label}", Plan([*steps, levels_step(entries), *copies]), files)

    if lesson is None:
        return packed(None)
    student = add_difference(base, expanded(packed(None), DELTA_QUANT))
    specs = [TensorSpec(entry.name, "F32", (entry.scales, 1)) for entry in entries]
    compute = _Distil(base, tuned, student, entries, coded, lesson)
    return packed(Checkpoint(tuned.label, Deferred(specs, [student, tuned], compute, memory=3 * memory_of(tuned))))


def _step(entry: Entry, base: Checkpoint, place: str, tuned: Checkpoint, scales: Checkpoint | None) -> Step:
    """The step that codes the difference of one weight, with the scales of least squares or with those that were trained."""

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            coded = encode_difference(tensors[0], tensors[1], entry.coding)
        return apart_tensors(Coded(coded.codes, tensors[2], coded.coding) if scales else coded)

    reads = ((base, place), (tuned, entry.name), *([(scales, entry.name)] if scales else []))
    return Step(reads, apart_specs(entry), run)


def encode_difference(before: Tensor, after: Tensor, coding: Coding) -> Coded:
    """`after - before`, taken in float32, as codes: a block of rows at a time, which changes nothing."""
    size = max(1, BLOCK // before.shape[1])
    blocks = [slice(first, first + size) for first in range(0, len(before), size)]

    def difference(rows: slice) -> Tensor:
        return after[rows].float() - before[rows].float()

    if coding.scale != "tensor":
        parts = [encode(difference(rows), coding) for rows in blocks]
        return Coded(torch.cat([part.codes for part in parts]), torch.cat([part.stats for part in parts]), coding)
    spread = (sum(float(difference(rows).double().square().sum()) for rows in blocks) / before.numel()) ** 0.5
    codes, along, across = torch.empty(before.shape, dtype=torch.uint8), 0.0, 0.0
    for rows in blocks:
        part = difference(rows).double()
        codes[rows] = nearest(part / (spread or 1.0), coding)
        values = levels_of(codes[rows], coding).double()
        along, across = along + float((part * values).sum()), across + float((values * values).sum())
    return Coded(codes, torch.tensor([[along / across]]), coding)


# ---- scale distillation ----


class _Scaled(nn.Module):
    """A weight as `base + factor * difference`, the factor of each scale being what trains."""

    def __init__(self, difference: Tensor, scales: int) -> None:
        super().__init__()
        self.register_buffer("difference", difference, persistent=False)
        self.factor = nn.Parameter(torch.ones(scales, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.factor - 1) * cast(Tensor, self.difference)


@dataclass(frozen=True)
class _Distil:
    """Trains the scales of a packed difference: `Deferred`'s computation."""

    base: Checkpoint
    tuned: Checkpoint
    student: Checkpoint
    entries: Sequence[Entry]
    places: Mapping[str, str]
    lesson: Lesson

    def __call__(self, work: Work) -> None:
        work.part("scales", lambda: self._scales(work))

    def _scales(self, work: Work) -> dict[str, Tensor]:
        model, teacher = load_model(self.student, progress=work.progress), load_model(self.tuned, progress=work.progress)
        parameters = describe(self.base).parameters
        found: dict[str, Tensor] = {}
        trained: dict[str, nn.Parameter] = {}
        for entry in self.entries:
            place = self.places[entry.name]
            coded = encode_difference(self.base.read(place), self.tuned.read(entry.name), entry.coding)
            found[entry.name] = coded.stats
            if (parameter := parameters.get(place)) is None:  # packed experts: their scales stay
                continue
            owner, _, leaf = parameter.rpartition(".")
            scaled = _Scaled(decode(coded), entry.scales)
            parametrize.register_parametrization(model.get_submodule(owner), leaf, scaled)
            trained[entry.name] = scaled.factor

        def loss(student: Any, batch: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(input_ids=batch, use_cache=False).logits
            error: Tensor = student(input_ids=batch, use_cache=False).logits - wanted
            return error.square().mean()

        refuse_failure(self.lesson.train(model, trained, loss, work))
        return found | {name: found[name] * factor.detach() for name, factor in trained.items()}
