"""A LoRA adapter at a few bits: from an adapter as peft has it to the packed one, computed as it is saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from mergekit_plus.adapters.peft import Adapter, LowRank
from mergekit_plus.checkpoint import Checkpoint, Plan, copy_step
from mergekit_plus.checkpoint.finite import is_finite
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT
from mergekit_plus.errors import CheckpointError, OptionError

from .codebooks import Codebook
from .coding import Coded, Coding, Scale
from .container import Entry, packed_step, rows_of, sidecar
from .factors import Gauge, Pair, encode_pair


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


def quantize_adapter(adapter: Adapter, options: QuantizeOptions) -> Checkpoint:
    """The adapter with the factors of every module at a few bits, packed; DoRA's lengths, biases and whole modules are carried as they are.

    Errors: OptionError for impossible options; CheckpointError for an adapter without factors, and, when it is computed, for one that was never trained
    (every B is zero) or that holds NaN.
    """
    if found := options.problems():
        raise OptionError("; ".join(found))
    if not adapter.lowrank:
        raise CheckpointError(f"{adapter.label} holds no low-rank factors, which are what is quantized")
    part, modules = adapter.checkpoint, list(adapter.lowrank.values())
    entries = entries_of_modules(part, modules, options.coding)
    reads = [(part, name) for module in modules for name in (module.a, module.b)]

    def code(tensors: Sequence[Tensor]) -> Sequence[Sequence[Coded]]:
        check_trained(part.label, modules, tensors)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "adapter") as pool:
            coded = pool.map(lambda pair: _encode(pair[0], pair[1], options), pairs)
            return [[factor] for pair in coded for factor in pair]

    taken = {entry.name for entry in entries}
    steps = [packed_step(entries, reads, code), *(copy_step(part, name) for name in part.specs if name not in taken)]
    return Checkpoint(f"{part.label} at {options.coding}", Plan(steps), {**part.files, ADAPTER_QUANT: sidecar(entries)}, part.notes)


def entries_of_modules(part: Checkpoint, modules: Sequence[LowRank], coding: Coding) -> list[Entry]:
    """A and B of every module, as they are coded."""
    specs = [(part.specs[name], axis) for module in modules for name, axis in ((module.a, 0), (module.b, 1))]
    return [Entry(spec.name, spec.dtype, spec.shape, axis, (coding.bits,) * spec.shape[axis], coding) for spec, axis in specs]


def check_trained(label: str, modules: Sequence[LowRank], tensors: Sequence[Tensor]) -> None:
    """CheckpointError for an adapter with NaN in it, and for one whose every B is zero."""
    for module, a, b in zip(modules, tensors[::2], tensors[1::2], strict=True):
        for name, tensor in ((module.a, a), (module.b, b)):
            if not is_finite(tensor):
                raise CheckpointError(f"{label}: {name} holds values that are NaN or infinite; mend the adapter")
    if not any(bool(b.any()) for b in tensors[1::2]):
        raise CheckpointError(f"{label} changes nothing: every B is zero, as before training; train it, or `compress adapter train` one")


def _encode(a: Tensor, b: Tensor, options: QuantizeOptions) -> Pair:
    return encode_pair(rows_of(a, 0), rows_of(b, 1).T, options.coding, options.gauge, options.refit)
