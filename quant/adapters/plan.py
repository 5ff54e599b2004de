"""A LoRA adapter at a few bits: from an adapter as peft has it to the packed one, computed as it is saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from mergekit_plus.adapters.peft import Adapter, LowRank
from mergekit_plus.checkpoint import Checkpoint, Plan, copy_step
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT
from mergekit_plus.errors import CheckpointError, OptionError

from ..allocate import solve
from .codebooks import BITS, WIDTHS, Codebook, product_loss
from .coding import Coded, Coding, Scale
from .container import packed_step, rows_of, sidecar
from .factors import Gauge, Pair, encode_pair, turned
from .modules import check_trained, factor_entries, factor_names
from .packing import row_bytes
from .train import Lesson, distilled


@dataclass(frozen=True)
class QuantizeOptions:
    """How to bring an adapter to a few bits: all of it at `bits`, or each component at a width of its own, `average_bits` on the average."""

    bits: int = 4
    codebook: Codebook = "l2"
    scale: Scale = "component"
    gauge: Gauge | None = None  # balanced, or svd for widths that differ
    refit: bool = True
    average_bits: float | None = None
    distill: float = 1.0  # where it trains on a text: the part of the loss that is the adapter's own predictions; the rest is the text's

    @property
    def coding(self) -> Coding:
        """How each factor is coded, where all are alike. Errors: OptionError."""
        return Coding(self.bits, self.codebook, self.scale)

    @property
    def chosen_gauge(self) -> Gauge:
        """The gauge, where none is given too."""
        return self.gauge or ("balanced" if self.average_bits is None else "svd")

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        found = []
        try:
            _ = self.coding
        except OptionError as error:
            found.append(str(error))
        if self.chosen_gauge not in get_args(Gauge):
            found.append(f"gauge={self.gauge!r}: one of {', '.join(get_args(Gauge))}")
        if not 0 <= self.distill <= 1:
            found.append(f"distill={self.distill:g}: a share of the loss, 0 to 1")
        if self.average_bits is not None and not 0 < self.average_bits <= BITS[-1]:
            found.append(f"average_bits={self.average_bits:g}: above 0 and up to {BITS[-1]}")
        if self.average_bits is not None and (self.chosen_gauge != "svd" or self.scale == "tensor"):
            found.append("components have widths of their own in the gauge of an SVD, with scales of their own; leave out gauge, and a scale for each tensor")
        return found


def quantize_adapter(adapter: Adapter, options: QuantizeOptions, base: Checkpoint | None = None, lesson: Lesson | None = None) -> Checkpoint:
    """The adapter with the factors of every module at a few bits, packed; DoRA's lengths, biases and whole modules are carried as they are.

    base, lesson: the model that it belongs to and a text, to distil the codes from the adapter; both or neither. With `average_bits` it reads the adapter
    before it returns, for the sizes of its components. Errors: OptionError for impossible options; CheckpointError for an adapter without factors or one
    that does not fit the base, and, when it is computed, for one that was never trained (every B is zero) or that holds NaN.
    """
    if found := options.problems() + (lesson.problems() if lesson else []):
        raise OptionError("; ".join(found))
    if (base is None) != (lesson is None):
        raise OptionError("to distil, give both a text and the base that the adapter was trained on")
    if not adapter.lowrank:
        raise CheckpointError(f"{adapter.label} holds no low-rank factors, which are what is quantized")
    part, modules = adapter.checkpoint, list(adapter.lowrank.values())
    names = factor_names(modules)
    codings = [options.coding] * len(modules) if options.average_bits is None else _mixed(part, modules, options, options.average_bits)
    entries = factor_entries([part.specs[name] for name in names], codings)

    def code(tensors: Sequence[Tensor]) -> Sequence[Coded]:
        check_trained(part, modules, tensors)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "adapter") as pool:
            pairs = pool.map(lambda a, b, coding: _encode(a, b, coding, options), tensors[::2], tensors[1::2], codings)
            return [factor for pair in pairs for factor in pair]

    steps = [packed_step(entries, [(part, name) for name in names], code)]
    if base is not None and lesson is not None:
        made = distilled(adapter, base, lesson, entries, options.chosen_gauge, options.refit, options.distill)
        steps = [copy_step(made, name) for name in made.specs]
    steps = [*steps, *(copy_step(part, name) for name in part.specs if name not in names)]
    return Checkpoint(f"{part.label} at {codings[0]}", Plan(steps), {**part.files, ADAPTER_QUANT: sidecar(entries)}, part.notes)


def _encode(a: Tensor, b: Tensor, coding: Coding, options: QuantizeOptions) -> Pair:
    return encode_pair(rows_of(a, 0), rows_of(b, 1).T, coding, options.chosen_gauge, options.refit)


def _mixed(part: Checkpoint, modules: Sequence[LowRank], options: QuantizeOptions, average: float) -> list[Coding]:
    """A width for each component of every module, so that least is lost of all updates together at so many bits on the average: a component of
    singular value s loses `s^2` times what its width does, by the theory of codebooks, all of it at 0 bits; integer programming chooses."""
    factors = [part.read(name) for name in factor_names(modules)]
    check_trained(part, modules, factors)
    losses, costs, total = [], [], 0
    for module, a, b in zip(modules, factors[::2], factors[1::2], strict=True):
        rows_a, rows_b = turned(rows_of(a, 0), rows_of(b, 1).T, "svd")
        widths = rows_a.shape[1], rows_b.shape[0]
        total += module.rank * sum(widths)
        for size in (rows_a.square().sum(1) * rows_b.square().sum(0)).tolist():
            losses.append([module.scale**2 * size * product_loss(options.codebook, bits) for bits in WIDTHS])
            costs.append([sum(row_bytes(width, bits) for width in widths) for bits in WIDTHS])
    chosen = iter(WIDTHS[choice] for choice in solve(losses, costs, int(average * total / 8)).choices)
    return [replace(options.coding, bits=tuple(next(chosen) for _ in range(module.rank))) for module in modules]
