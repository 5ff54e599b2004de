"""Adapters trained for few bits: straight-through training of latents, from scratch on a text, or distilled from an adapter that there is.

What is stored are the codes and scales of the latents; the latents themselves are never written (but for the trainer's own state, while it runs).
Training starts from the codes that post-hoc quantization finds, or, from scratch, as the 1-bit adapters of arXiv 2307.16867 do: A as a linear
layer begins, B from a normal of deviation 1e-3 cut at twice that, for a B of zeros has no scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mergekit_plus.adapters import apply
from mergekit_plus.adapters.extract import task_of
from mergekit_plus.adapters.layout import Product, adapter_of
from mergekit_plus.adapters.peft import Adapter, LowRank
from mergekit_plus.calibration.statistics import MomentsFile
from mergekit_plus.checkpoint import Checkpoint, Deferred, Work, copy_step
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT
from mergekit_plus.checkpoint.spec import matches, natural_order
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import adapter_reason, describe, quantized_reason
from mergekit_plus.progress import Progress
from mergekit_plus.training import Loss, TrainOptions, TrainRecord, distillation, loss_on, next_token, train

from ..loading import load
from ..plan import dequantize, is_packed
from .codebooks import Codebook
from .coding import Coding, Scale, encode
from .container import Entry, packed_specs, packed_tensors, rows_of, sidecar
from .factors import Gauge, encode_pair, turned, wanted
from .latent import Factors, Latent, Teacher, attached, sizes_of, small
from .modules import check_trained, factor_entries, factor_names
from .pools import Sharing, check_pools, pooled
from .principal import Init, Shifted, components
from .ranks import ranks_within, sensitivities

HELD_OUT = 16  # windows at most, evenly out of the text, on which the best state is chosen
RELATIVE_LR, LR = 3e-2, 3e-3  # of latents that start from an adapter, as a part of their size; from scratch
PLAIN = 16  # bits of an adapter that is trained as it is


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
            _train(student, latents, lesson, work, distill)
            return _packed(list(latents.values()), entries)

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


def _packed(latents: Sequence[Factors], entries: Sequence[Entry]) -> dict[str, Tensor]:
    with torch.no_grad():
        factors = [rows for latent in latents for rows in latent.stored()]
        coded = [encode(rows, entry.coding) for rows, entry in zip(factors, entries, strict=True)]
    return {spec.name: tensor for spec, tensor in zip(packed_specs(entries), packed_tensors(entries, coded), strict=True)}


def _train(base: Checkpoint, latents: Mapping[str, Factors], lesson: Lesson, work: Work, distill: float = 0.0) -> None:
    """Train latents on a model of this base."""
    model = load(base, progress=work.progress)
    with attached(model, latents) as parameters:
        record = lesson.train(model, parameters, distillation(Teacher(model, latents), distill) if distill else next_token, work)
    work.progress.tell(f"held-out loss {record.evaluations[0][1]:.4f} before, {record.value:.4f} after {record.best} steps")
    refuse_failure(record)


def refuse_failure(record: TrainRecord) -> None:
    """CheckpointError for a training that came to NaN."""
    if record.stopped:
        raise CheckpointError(f"{record.stopped}; train with a smaller learning rate")


def memory_of(base: Checkpoint) -> int:
    """Bytes of a model in float32."""
    return 4 * sum(spec.numel for spec in base.specs.values())


# ---- from scratch ----


@dataclass(frozen=True)
class TrainAdapterOptions:
    """What is trained: a rank for every linear layer that `target` matches (all of them by default), at these bits; 16 for a plain LoRA."""

    bits: int = 1
    rank: int = 8
    codebook: Codebook = "l2"
    scale: Scale = "component"
    target: tuple[str, ...] = ()  # shell patterns of modules: "q_proj", "layers.3.*"
    alpha: float = 2.0  # what the product is multiplied with: LoRA's alpha / r
    init: Init = "lora"  # which components of the weights train, in place of what is added to them
    budget: int | None = None  # of parameters: ranks up to `rank` where they count most
    sharing: Sharing | None = None  # pools that modules of a kind share

    def problems(self, calibrated: bool = False) -> list[str]:
        """Everything wrong with them, a sentence each; calibrated: where the moments of the base's inputs on a text are given."""
        found = [f"rank must be 1 or more, not {self.rank}"] if self.rank < 1 else []
        found += [f"alpha must be positive, not {self.alpha:g}"] if not self.alpha > 0 else []
        try:
            _ = self.coding
        except OptionError as error:
            found.append(f"{error}; 16 trains a plain LoRA")
        if self.init not in get_args(Init):
            found.append(f"unknown init '{self.init}'.{nearest(self.init, get_args(Init))}")
        elif self.init != "lora" and (self.bits != PLAIN or self.sharing is not None):
            found.append(f"{self.init} starts from components of each weight, in full numbers; train it at 16 bits and without pools")
        if calibrated != self.init.startswith("corda"):
            found.append("CorDA looks at a calibration text, the task's or that of what is to stay, and nothing else does; give both or neither")
        if self.sharing is not None:
            found += self.sharing.problems(self.rank)
        if self.budget is not None and self.sharing is not None:
            found.append("pools have as many parameters as their rank says; give them, or a budget")
        return found

    @property
    def coding(self) -> Coding | None:
        """How the factors are coded, None where they are not. Errors: OptionError."""
        return None if self.bits == PLAIN else Coding(self.bits, self.codebook, self.scale)


def train_adapter(
    base: Checkpoint, lesson: Lesson, options: TrainAdapterOptions, moments: Checkpoint | None = None, progress: Progress | None = None
) -> Checkpoint:
    """A LoRA adapter of the base, trained on the text: at few bits packed, at 16 bits an ordinary one in float16. A packed base stays packed meanwhile.

    moments: of the inputs of the base's layers, as `calibrate` makes them, for CorDA. With a budget it runs the base on the text before it returns, for the
    ranks. Errors: OptionError for impossible options; CheckpointError where the base has no linear layers that `target` matches.
    """
    if found := options.problems(calibrated=moments is not None) + lesson.problems():
        raise OptionError("; ".join(found))
    dense = dequantize(base) if is_packed(base) else base  # whose weights have names, shapes and components
    if reason := quantized_reason(dense) or adapter_reason(base):
        raise CheckpointError(reason)
    grams = None if moments is None else MomentsFile(moments)
    if grams is not None:
        grams.check(dense)
    modules = _modules(dense, options.target)
    coding, turned_weights = options.coding, any(module.transposed for module in modules.values())
    ranks = {name: min(options.rank, *module.shape) for name, module in modules.items()}
    notes: tuple[str, ...] = ()
    if options.budget is not None:
        ranks, notes = _within(dense, lesson, options.budget, options.rank, modules, progress)
    twice = 1 if options.init == "lora" else 2  # what starts from components of the weight has these taken away
    products = [Product(name, min(twice * ranks[name], *module.shape), module.shape) for name, module in modules.items() if ranks[name]]
    if options.sharing is not None:
        check_pools(products, options.rank, options.sharing)
    specs = [spec for product in products for spec in product.specs("F16" if coding is None else "F32")]
    entries = [] if coding is None else factor_entries(specs, [coding] * len(products))

    def compute(work: Work) -> None:
        def made() -> Mapping[str, Tensor]:
            generator = torch.Generator().manual_seed(lesson.training.seed)
            latents: Mapping[str, Factors]
            if options.sharing is not None:
                latents = pooled(products, options.rank, options.sharing, coding, options.alpha, generator)
            elif options.init != "lora":
                latents = {product.module: _shifted(dense, modules[product.module], ranks[product.module], options.init, grams) for product in products}
            else:
                latents = {product.module: _fresh(product, coding, options.alpha, generator) for product in products}
            _train(base, latents, lesson, work)
            if coding is not None:
                return _packed(list(latents.values()), entries)
            with torch.no_grad():
                rows = [rows for latent in latents.values() for rows in latent.stored()]
                return {spec.name: (row.T if i % 2 else row).half().contiguous() for i, (spec, row) in enumerate(zip(specs, rows, strict=True))}

        work.part("adapter", made)

    written = specs if coding is None else packed_specs(entries)
    reads = [base] if moments is None else [base, moments]
    made = Checkpoint(f"adapter of {base.label}", Deferred(written, reads, compute, memory=memory_of(base)))
    copies = [copy_step(made, spec.name) for spec in written]
    adapter = replace(adapter_of(made.label, products, copies, base.ref, task_of(base), fan_in_fan_out=turned_weights), notes=notes)
    return adapter if coding is None else replace(adapter, files={**adapter.files, ADAPTER_QUANT: sidecar(entries)})


@dataclass(frozen=True)
class _Linear:
    """A linear layer to train beside: (out, in), whether the weight is stored as its transpose, and by which name."""

    shape: tuple[int, int]
    transposed: bool
    stored: str


def _modules(base: Checkpoint, target: Sequence[str]) -> dict[str, _Linear]:
    """The linear layers to train beside, as transformers names them."""
    meanings = [meaning for meaning in describe(base).tensors.values() if meaning.role == "linear" and meaning.parameter and meaning.name in base.specs]
    parameters = Counter(meaning.parameter for meaning in meanings)
    found: dict[str, _Linear] = {}
    for meaning in sorted(meanings, key=lambda meaning: natural_order(meaning.name)):
        shape, module = base.specs[meaning.name].shape, str(meaning.parameter).rpartition(".")[0]
        if len(shape) == 2 and parameters[meaning.parameter] == 1 and (not target or matches(module, target)):
            found[module] = _Linear((shape[1], shape[0]) if meaning.transposed else (shape[0], shape[1]), meaning.transposed, meaning.name)
    for pattern in target:
        if not any(matches(module, [pattern]) for module in found):
            known = sorted({str(name).split(".")[-2] for name in parameters})
            raise OptionError(f"--target '{pattern}' matches no linear layer of {base.label}.{nearest(pattern, known)}")
    if not found:
        raise CheckpointError(f"{base.label} has no linear layers in its blocks to train beside")
    return found


def _within(
    base: Checkpoint, lesson: Lesson, budget: int, most: int, modules: Mapping[str, _Linear], progress: Progress | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The ranks of modules within the budget, by the windows that are trained on, and a note that says them."""
    transposed = {name: module.transposed for name, module in modules.items()}
    ranks = ranks_within(sensitivities(load_model(base, progress=progress), transposed, lesson.parts()[0], progress), budget, most)
    used = sum(rank * sum(modules[name].shape) for name, rank in ranks.items())
    count = Counter(ranks.values())
    told = ", ".join(f"rank {rank}: {count[rank]}" for rank in sorted(count))
    return ranks, (f"{used} of {budget} parameters; modules by their rank: {told}",)


def _shifted(base: Checkpoint, module: _Linear, rank: int, init: Init, grams: MomentsFile | None) -> Shifted:
    """Latents that start from components of a module's weight."""
    weight, gram = base.read(module.stored), None
    if grams is not None:
        part, name = grams.reads(module.stored)[0]
        gram = part.read(name)
    return Shifted(*components(weight.T if module.transposed else weight, gram, rank, init, module.stored))


def _fresh(product: Product, coding: Coding | None, alpha: float, generator: torch.Generator) -> Latent:
    out, width = product.shape
    a = torch.empty(product.rank, width).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator)
    rows_b = alpha * small((product.rank, out), coding, generator)
    return Latent(a, rows_b, 1.0, coding, (torch.tensor(1.0), torch.tensor(alpha)))
