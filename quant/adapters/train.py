"""What adapters train on and how, and the codes of an adapter trained on a text: straight-through training of latents.

What is stored are the codes and scales of the latents; the latents themselves are never written (but for the trainer's own state, while it runs).
Training starts from the codes that post-hoc quantization finds; from scratch it is in scratch.py, and of neurons in neurons.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_plus.adapters import apply
from mergekit_plus.adapters.peft import Adapter, LowRank
from mergekit_plus.checkpoint import Checkpoint, Deferred, Work
from mergekit_plus.errors import CheckpointError
from mergekit_plus.training import Loss, TrainOptions, TrainRecord, distillation, loss_on, next_token, train

from ..loading import load
from .coding import Coding, encode
from .container import Entry, packed_specs, packed_tensors, rows_of
from .factors import Gauge, encode_pair, turned, wanted
from .latent import Factors, Latent, Teacher, attached, sizes_of
from .modules import check_trained, factor_names

HELD_OUT = 16  # windows at most, evenly out of the text, on which the best state is chosen
RELATIVE_LR = 3e-2  # of what starts from an adapter or a difference, as a part of its size


@dataclass(frozen=True)
class Lesson:
    """What is trained on, int64 [windows, window], and how. A part of the windows is kept to choose the best state on."""

    ids: Tensor
    training: TrainOptions = field(default_factory=lambda: TrainOptions(lr=RELATIVE_LR, batch=4, warmup=0.05, schedule="cosine", clip=None))

    def problems(self) -> list[str]:
        """Everything wrong with it, a sentence each."""
        return self.training.problems() + (["training needs two windows of text or more"] if len(self.ids) < 2 else [])

    def parts(self) -> tuple[Tensor, Tensor]:
        """The windows to train on, and those that are held out."""
        held = min(HELD_OUT, max(1, len(self.ids) // 8))
        out = torch.zeros(len(self.ids), dtype=torch.bool)
        out[torch.arange(held) * len(self.ids) // held] = True
        return self.ids[~out], self.ids[out]

    def train(self, model: Any, parameters: Mapping[str, nn.Parameter], loss: Loss, work: Work) -> TrainRecord:
        """Train parameters of a model on it; the model is left in the state that is best on the windows held out."""
        rows, held = self.parts()
        return train(
            model, parameters, loss, rows, self.training, evaluate=lambda: loss_on(model, held, loss, batch=4), folder=work.folder, progress=work.progress
        )

    def teach(self, model: Any, parameters: Mapping[str, nn.Parameter], loss: Loss, work: Work) -> None:
        """Train, and tell what it did to the loss. Errors: CheckpointError for a training that came to NaN."""
        record = self.train(model, parameters, loss, work)
        work.progress.tell(f"held-out loss {record.evaluations[0][1]:.4f} before, {record.value:.4f} after {record.best} steps")
        refuse_failure(record)


def distilled(
    adapter: Adapter, base: Checkpoint, lesson: Lesson, entries: Sequence[Entry], gauge: Gauge, refit: bool, distill: float
) -> Checkpoint:
    """The packed tensors of an adapter, trained on a text: for what the model predicts with the adapter (KL) and, `distill` being this part's share of
    the loss, for the text itself.

    DoRA's lengths stay as they are. Errors: CheckpointError where the adapter does not fit the base, or has modules that are no linear layers, or biases.
    """
    apply(base, [adapter])  # refuses what does not fit
    for module in adapter.lowrank.values():
        if module.embedding or module.bias or len(adapter.checkpoint.specs[module.a].shape) > 2:
            raise CheckpointError(
                f"{adapter.label}: {module.module} is more than a product B A beside a linear layer, which cannot be distilled; leave --text out"
            )
    student = apply(base, [replace(adapter, lowrank={})]) if adapter.whole else base

    def compute(work: Work) -> None:
        def made() -> Mapping[str, Tensor]:
            modules = list(adapter.lowrank.values())
            factors = [adapter.checkpoint.read(name) for name in factor_names(modules)]
            check_trained(adapter.checkpoint, modules, factors)
            latents = {
                module.module: _of_product(adapter, module, a, b, entry.coding, gauge, refit)
                for module, a, b, entry in zip(modules, factors[::2], factors[1::2], entries[::2], strict=True)
            }
            return packed_rows(train_beside(student, latents, lesson, work, distill), entries)

        work.part("adapter", made)

    return Checkpoint(adapter.label, Deferred(packed_specs(entries), [adapter.checkpoint, student], compute, memory=memory_of(student)))


def _of_product(adapter: Adapter, module: LowRank, a: Tensor, b: Tensor, coding: Coding, gauge: Gauge, refit: bool) -> Latent:
    plain = rows_of(a, 0).float(), rows_of(b, 1).float()
    a, b = turned(plain[0], plain[1].T, gauge)
    rows_b = b.T
    if refit:
        a, rows_b = wanted(a, rows_b, encode_pair(a, b, coding, "none"))
    lengths = adapter.checkpoint.read(module.magnitude).float().flatten() if module.magnitude else None
    latent = Latent(a, rows_b, module.scale, coding, (sizes_of(a), sizes_of(rows_b)), lengths)
    latent.plain = plain
    return latent


def train_beside(base: Checkpoint, latents: Mapping[str, Factors], lesson: Lesson, work: Work, distill: float = 0.0) -> list[Tensor]:
    """Train latents beside modules of a model of this base; then what is stored of them, A and B's columns of each."""
    model = load(base, progress=work.progress)
    with attached(model, latents) as parameters:
        lesson.teach(model, parameters, distillation(Teacher(model, latents), distill) if distill else next_token, work)
    with torch.no_grad():
        return [rows for latent in latents.values() for rows in latent.stored()]


def packed_rows(rows: Sequence[Tensor], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The packed tensors of what was trained, by name."""
    coded = [encode(row, entry.coding) for row, entry in zip(rows, entries, strict=True)]
    return {spec.name: tensor for spec, tensor in zip(packed_specs(entries), packed_tensors(entries, coded), strict=True)}


def refuse_failure(record: TrainRecord) -> None:
    """CheckpointError for a training that came to NaN."""
    if record.stopped:
        raise CheckpointError(f"{record.stopped}; train with a smaller learning rate")


def memory_of(base: Checkpoint) -> int:
    """Bytes of a model in float32."""
    return 4 * sum(spec.numel for spec in base.specs.values())
