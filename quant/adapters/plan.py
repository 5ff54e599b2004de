"""A LoRA adapter at a few bits: from an adapter as peft has it to the packed one, computed as it is saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from mergekit_plus.adapters.peft import Adapter
from mergekit_plus.checkpoint import Checkpoint, Plan, copy_step
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT
from mergekit_plus.errors import CheckpointError, OptionError

from .codebooks import Codebook
from .coding import Coded, Coding, Scale
from .container import packed_step, rows_of, sidecar
from .factors import Gauge, Pair, encode_pair
from .modules import check_trained, factor_entries, factor_names
from .train import Lesson, distilled


@dataclass(frozen=True)
class QuantizeOptions:
    """How to bring an adapter to a few bits."""

    bits: int = 4
    codebook: Codebook = "l2"
    scale: Scale = "component"
    gauge: Gauge = "balanced"
    refit: bool = True

    @property
    def coding(self) -> Coding:
        """How each factor is coded. Errors: OptionError."""
        return Coding(self.bits, self.codebook, self.scale)

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        found = []
        try:
            _ = self.coding
        except OptionError as error:
            found.append(str(error))
        if self.gauge not in get_args(Gauge):
            found.append(f"gauge={self.gauge!r}: one of {', '.join(get_args(Gauge))}")
        return found


def quantize_adapter(adapter: Adapter, options: QuantizeOptions, base: Checkpoint | None = None, lesson: Lesson | None = None) -> Checkpoint:
    """The adapter with the factors of every module at a few bits, packed; DoRA's lengths, biases and whole modules are carried as they are.

    base, lesson: the model that it belongs to and a text, to distil the codes from the adapter; both or neither.
    Errors: OptionError for impossible options; CheckpointError for an adapter without factors or one that does not fit the base, and, when it is
    computed, for one that was never trained (every B is zero) or that holds NaN.
    """
    if found := options.problems() + (lesson.problems() if lesson else []):
        raise OptionError("; ".join(found))
    if (base is None) != (lesson is None):
        raise OptionError("to distil, give both a text and the base that the adapter was trained on")
    if not adapter.lowrank:
        raise CheckpointError(f"{adapter.label} holds no low-rank factors, which are what is quantized")
    part, modules = adapter.checkpoint, list(adapter.lowrank.values())
    names = factor_names(modules)
    entries = factor_entries([part.specs[name] for name in names], options.coding)

    def code(tensors: Sequence[Tensor]) -> Sequence[Sequence[Coded]]:
        check_trained(part, modules, tensors)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "adapter") as pool:
            coded = pool.map(lambda pair: _encode(pair[0], pair[1], options), pairs)
            return [[factor] for pair in coded for factor in pair]

    steps = [packed_step(entries, [(part, name) for name in names], code)]
    if base is not None and lesson is not None:
        made = distilled(adapter, base, lesson, entries, options.gauge, options.refit)
        steps = [copy_step(made, name) for name in made.specs]
    steps = [*steps, *(copy_step(part, name) for name in part.specs if name not in names)]
    return Checkpoint(f"{part.label} at {options.coding}", Plan(steps), {**part.files, ADAPTER_QUANT: sidecar(entries)}, part.notes)


def _encode(a: Tensor, b: Tensor, options: QuantizeOptions) -> Pair:
    return encode_pair(rows_of(a, 0), rows_of(b, 1).T, options.coding, options.gauge, options.refit)
