"""Many packed adapters on one base in memory: their codes stay packed, and a module's factors are expanded for as long as one call of it takes.

    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.add(name, Checkpoint.open(folder))
    with bank.using(["code", None, "drama"]):    # an adapter, or none, for each row of the batch
        model(input_ids=rows)

The reference path: plain torch, what kernels for packed adapters must agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.adapters import read_adapter
from mergekit_plus.checkpoint import Checkpoint, Plan
from mergekit_plus.checkpoint.plan import execute
from mergekit_plus.errors import CheckpointError, OptionError, nearest

from .container import Entry, Expand, expand, widths_of


@dataclass(frozen=True)
class Factor:
    """One factor as it is stored."""

    entry: Entry
    codes: Tensor
    stats: Tensor
    tables: dict[int, Tensor]

    @classmethod
    def of(cls, opened: Checkpoint, name: str) -> Factor:
        """A factor of an opened packed adapter; its checksum is compared."""
        step = opened.source.step_of[name] if isinstance(opened.source, Plan) else None
        if step is None or not isinstance(step.run, Expand):
            raise CheckpointError(f"{opened.label}: {name} is not packed; `compress adapter quantize` packs an adapter")
        execute(step)  # raises where the checksum differs
        codes, stats, _, *levels = (part.read(tensor) for part, tensor in step.reads)
        return cls(step.run.entry, codes, stats, dict(zip(widths_of([step.run.entry]), levels, strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.stats.nbytes

    def tensor(self) -> Tensor:
        """The factor, expanded."""
        return expand(self.entry, self.codes, self.stats, self.tables)


class AdapterBank:
    """Packed adapters of one model, of which each row of a batch uses one or none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, dict[str, tuple[Factor, Factor, float]]] = {}

    def add(self, name: str, opened: Checkpoint) -> None:
        """Take in a packed adapter under a name.

        Errors: CheckpointError for one that is not packed, is more than products beside linear layers, or does not fit the model.
        """
        adapter = read_adapter(opened)
        if adapter.whole or any(module.magnitude or module.bias or module.embedding for module in adapter.lowrank.values()):
            raise CheckpointError(f"{opened.label} is more than products B A beside linear layers; expand it, and apply it with peft")
        found = {module.module: (Factor.of(opened, module.a), Factor.of(opened, module.b), module.scale) for module in adapter.lowrank.values()}
        for module, (a, b, _) in found.items():
            owner = self._modules().get(module)
            shape = tuple(owner.weight.shape) if isinstance(owner, nn.Linear) else None
            if shape != (b.entry.shape[0], a.entry.shape[1]):
                raise CheckpointError(f"{opened.label}: {module} is a linear layer {(b.entry.shape[0], a.entry.shape[1])}, in the model {shape or 'none'}")
        self.adapters[name] = found

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(a.nbytes + b.nbytes for modules in self.adapters.values() for a, b, _ in modules.values())

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """The model with an adapter for each row of the batch that it is called with."""
        if unknown := next((name for name in names if name is not None and name not in self.adapters), None):
            raise OptionError(f"the bank has no adapter '{unknown}'.{nearest(unknown, self.adapters)}")
        wanted = {name: torch.tensor([row for row, own in enumerate(names) if own == name]) for name in dict.fromkeys(names) if name is not None}
        modules = {module for name in wanted for module in self.adapters[name]}
        handles = [self._modules()[module].register_forward_hook(partial(self._add, module, wanted)) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: str, wanted: dict[str, Tensor], owner: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        for name, rows in wanted.items():
            if module in self.adapters[name]:
                a, b, scale = self.adapters[name][module]
                x = inputs[0][rows]
                output[rows] += functional.linear(functional.linear(x, a.tensor().to(x.dtype)), b.tensor().to(x.dtype)) * scale
        return output

    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())
