"""A LoRA adapter trained from scratch on a text, for few bits or as it is: plain, in pools, from components of the weights, at ranks within a budget.

It starts as the 1-bit adapters of arXiv 2307.16867 do: A as a linear layer begins, B from a normal of deviation 1e-3 cut at twice that, for a B of zeros
has no scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import get_args

import torch
from torch import Tensor

from mergekit_plus.adapters.extract import task_of
from mergekit_plus.adapters.layout import Product, adapter_of
from mergekit_plus.calibration.statistics import MomentsFile
from mergekit_plus.checkpoint import Checkpoint, Deferred, Step, TensorSpec, Work, copy_step
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT
from mergekit_plus.checkpoint.spec import matches
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import adapter_reason, describe, quantized_reason
from mergekit_plus.progress import Progress

from ..plan import dequantize, is_packed
from .codebooks import Codebook
from .coding import Coding, Scale
from .container import Entry, packed_specs, sidecar
from .latent import Factors, Latent, small
from .pools import Sharing, check_pools, pooled
from .principal import Init, Shifted, components
from .ranks import ranks_within, sensitivities
from .train import Lesson, memory_of, packed_rows, train_beside

LR = 3e-3  # of what starts at random, and near zero
PLAIN = 16  # bits of an adapter that is trained as it is


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

    def train(work: Work) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(lesson.training.seed)
        latents: Mapping[str, Factors]
        if options.sharing is not None:
            latents = pooled(products, options.rank, options.sharing, coding, options.alpha, generator)
        elif options.init != "lora":
            latents = {product.module: _shifted(dense, modules[product.module], ranks[product.module], options.init, grams) for product in products}
        else:
            latents = {product.module: _fresh(product, coding, options.alpha, generator) for product in products}
        return train_beside(base, latents, lesson, work)

    label, reads = f"adapter of {base.label}", [base] if moments is None else [base, moments]
    steps, files = written(label, reads, [(spec, i % 2) for i, spec in enumerate(specs)], coding, train)
    adapter = adapter_of(label, products, steps, base.ref, task_of(base), fan_in_fan_out=turned_weights)
    return replace(adapter, files={**adapter.files, **files}, notes=notes)


def written(
    label: str, reads: Sequence[Checkpoint], tensors: Sequence[tuple[TensorSpec, int]], coding: Coding | None, train: Callable[[Work], Sequence[Tensor]]
) -> tuple[list[Step], dict[str, bytes]]:
    """The steps that write what is trained, packed where it is coded, else in float16; and the sidecar of what is packed.

    reads: the base, and what else is looked at. tensors: each with the axis of it that the rows are, which `train` gives, [rows, width].
    """
    entries = [] if coding is None else [Entry(spec.name, spec.dtype, spec.shape, axis, coding) for spec, axis in tensors]

    def compute(work: Work) -> None:
        def made() -> Mapping[str, Tensor]:
            found = train(work)
            if entries:
                return packed_rows(found, entries)
            return {spec.name: (row.T if axis else row).half().contiguous() for (spec, axis), row in zip(tensors, found, strict=True)}

        work.part("adapter", made)

    specs = packed_specs(entries) if entries else [spec for spec, _ in tensors]
    made = Checkpoint(label, Deferred(specs, reads, compute, memory=memory_of(reads[0])))
    return [copy_step(made, spec.name) for spec in specs], {ADAPTER_QUANT: sidecar(entries)} if entries else {}


@dataclass(frozen=True)
class _Linear:
    """A linear layer to train beside: (out, in), whether the weight is stored as its transpose, and by which name."""

    shape: tuple[int, int]
    transposed: bool
    stored: str


def _modules(base: Checkpoint, target: Sequence[str]) -> dict[str, _Linear]:
    """The linear layers to train beside, as transformers names them."""
    meanings = describe(base)
    modules = {name: parameter.rpartition(".")[0] for name, parameter in meanings.parameters.items() if meanings.tensors[name].role == "linear"}
    found: dict[str, _Linear] = {}
    for name, module in modules.items():
        shape, transposed = base.specs[name].shape, meanings.tensors[name].transposed
        if len(shape) == 2 and (not target or matches(module, target)):
            found[module] = _Linear((shape[1], shape[0]) if transposed else (shape[0], shape[1]), transposed, name)
    for pattern in target:
        if not any(matches(module, [pattern]) for module in found):
            known = sorted({module.rpartition(".")[2] for module in modules.values()})
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
