"""Many packed adapters on one base in memory: their codes stay packed. Factors of one bit are multiplied as they are; others are expanded for as long as
one call of their module takes.

    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.add(name, Checkpoint.open(folder))
    with bank.using(["code", None, "drama"]):    # an adapter, or none, for each row of the batch
        model(input_ids=rows)

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
from mergekit_plus.errors import CheckpointError, OptionError, nearest

from ..kernels import signs_linear
from .container import Entry, Expand, expand


@dataclass(frozen=True)
class Place:
    """Where a factor lies in the blobs of its adapter."""

    entry: Entry
    codes: slice
    stats: slice


Layout = dict[str, tuple[Place, Place, float]]  # A, B and the scale of each module; adapters that are laid out alike share one


@dataclass(frozen=True)
class Packed:
    """An adapter as it is stored: one blob of codes and one of scales, for a tensor of its own for each factor would cost more than its bits."""

    layout: Layout
    codes: Tensor  # uint8
    stats: Tensor  # float32 [scales, columns]
    tables: dict[int, Tensor]

    def times(self, place: Place, x: Tensor) -> Tensor:
        """x F^T for a factor F; float32 where F is one bit a number, else in x's dtype."""
        entry, codes, stats = place.entry, self.codes[place.codes], self.stats[place.stats]
        if entry.coding.bits != 1 or entry.coding.scale == "group":
            return functional.linear(x, expand(entry, codes, stats, self.tables).to(x.dtype))
        low, high = self.tables[1].unbind()
        # level = middle + spread * sign; each row's has its scale, and what is not of the sign multiplies the sum of x
        spread, middle = stats[:, -1] * (high - low) / 2, stats[:, -1] * (high + low) / 2
        middle = middle + stats[:, 0] if entry.coding.columns == 2 else middle
        signs = codes.view(entry.rows, -1)
        if entry.axis == 0:
            return signs_linear(x, signs, entry.width) * spread + x.float().sum(-1, keepdim=True) * middle
        return signs_linear(x * spread, signs, entry.width, transposed=True) + (x * middle).sum(-1, keepdim=True)


class AdapterBank:
    """Packed adapters of one model, of which each row of a batch uses one or none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Packed] = {}

    def add(self, name: str, opened: Checkpoint) -> None:
        """Take in a packed adapter under a name; its checksums are compared.

        Errors: CheckpointError for one that is not packed, is more than products beside linear layers, or does not fit the model.
        """
        adapter = read_adapter(opened)
        if not adapter.plain:
            raise CheckpointError(f"{opened.label} is more than products B A beside linear layers; expand it, and apply it with peft")
        codes, stats, tables = list[Tensor](), list[Tensor](), dict[int, Tensor]()
        at = scale = 0

        def place(tensor: str) -> Place:
            nonlocal at, scale
            entry, own_codes, own_stats, own_tables = _stored(opened, tensor)
            found = Place(entry, slice(at, at + own_codes.numel()), slice(scale, scale + len(own_stats)))
            codes.append(own_codes.flatten())
            stats.append(own_stats)
            tables.update(own_tables)
            at, scale = found.codes.stop, found.stats.stop
            return found

        layout = {module.module: (place(module.a), place(module.b), module.scale) for module in adapter.lowrank.values()}
        owners = dict(self.model.named_modules())
        for module, (a, b, _) in layout.items():
            owner = owners.get(module)
            shape = tuple(owner.weight.shape) if isinstance(owner, nn.Linear) else None
            if shape != (b.entry.shape[0], a.entry.shape[1]):
                raise CheckpointError(f"{opened.label}: {module} is a linear layer {(b.entry.shape[0], a.entry.shape[1])}, in the model {shape or 'none'}")
        layout = next((known.layout for known in self.adapters.values() if known.layout == layout), layout)
        self.adapters[name] = Packed(layout, torch.cat(codes), torch.cat(stats), tables)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(packed.codes.nbytes + packed.stats.nbytes for packed in self.adapters.values())

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """The model with an adapter for each row of the batch that it is called with."""
        if unknown := next((name for name in names if name is not None and name not in self.adapters), None):
            raise OptionError(f"the bank has no adapter '{unknown}'.{nearest(unknown, self.adapters)}")
        wanted = {name: torch.tensor([row for row, own in enumerate(names) if own == name]) for name in dict.fromkeys(names) if name is not None}
        modules = {module for name in wanted for module in self.adapters[name].layout}
        handles = [self.model.get_submodule(module).register_forward_hook(partial(self._add, module, wanted)) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: str, wanted: dict[str, Tensor], owner: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        for name, rows in wanted.items():
            packed = self.adapters[name]
            if module in packed.layout:
                a, b, scale = packed.layout[module]
                output[rows] += (packed.times(b, packed.times(a, inputs[0][rows])) * scale).to(output.dtype)
        return output


def _stored(opened: Checkpoint, name: str) -> tuple[Entry, Tensor, Tensor, dict[int, Tensor]]:
    """A factor of an opened packed adapter as it is stored: how it is coded, codes, scales, and codebooks."""
    step = opened.source.step_of[name] if isinstance(opened.source, Plan) else None
    if step is None or not isinstance(step.run, Expand):
        raise CheckpointError(f"{opened.label}: {name} is not packed; `compress adapter quantize` packs an adapter")
    return step.run.entry, *step.run.checked([part.read(tensor) for part, tensor in step.reads])
