"""Merges in memory for the tests: a Scan over dicts of tensors, cut into pieces, and a method applied to every piece of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.merge import METHODS
from mergekit_plus.noise import Noise

Model = Mapping[str, Tensor]


@dataclass(frozen=True)
class Piece:
    name: str
    first: int  # flat index of its first element
    base: Tensor | None
    models: list[Tensor]


@dataclass
class MemoryScan:
    """The tensors of `models` (and `base`) in pieces of `rows` rows; it counts its passes, and its samples are every 16th piece."""

    models: Sequence[Model]
    base: Model | None = None
    rows: int | None = None
    workers: int = 1
    unit: str = "element"
    passes: int = 0
    samples: int = 0

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.models[0].values())

    @property
    def pieces(self) -> list[Piece]:
        found = []
        for name, tensor in self.models[0].items():
            height = tensor.shape[0] if tensor.dim() else 1
            whole = self.unit == "tensor" or (self.unit == "row" and tensor.dim() < 2)
            step = max(1, height) if whole else self.rows or max(1, height)
            for start in range(0, max(1, height), step):
                cut = slice(start, start + step) if tensor.dim() else ...
                first = start * (tensor.numel() // max(1, height))
                base = None if self.base is None else self.base[name][cut]
                found.append(Piece(name, first, base, [model[name][cut] for model in self.models]))
        return found

    def recall(self, compute: Callable[[], Any]) -> Any:
        return compute()

    def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False, only: Collection[int] | None = None) -> list[Any]:
        pieces = self.pieces[:: 16 if sample else 1] if only is None else [piece for number, piece in enumerate(self.pieces) if number in only]
        self.samples += sample
        self.passes += not sample and only is None
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda piece: function(piece.base, piece.models), pieces))


def one(*models: Tensor, base: Tensor | None = None, rows: int | None = None) -> MemoryScan:
    """The scan of a single tensor of each model."""
    return MemoryScan([{"x": model} for model in models], None if base is None else {"x": base}, rows)


def merged(
    method: str, base: Model | None, models: Sequence[Model], rows: int | None = None, seed: int = 0, workers: int = 1, **options: object
) -> dict[str, Tensor]:
    """The merge of whole models in the working dtype, `rows` rows at a time."""
    chosen = METHODS[method]
    arguments = chosen.options.check({name.rstrip("_"): value for name, value in options.items()}, len(models))
    if chosen.check:
        chosen.check(arguments)

    def measure(scan: MemoryScan) -> Any:
        assert chosen.statistic is not None
        return chosen.statistic(scan, **{name: value for name, value in {"models": len(models), **arguments}.items() if name in chosen.statistic_takes})

    def alone(name: str) -> MemoryScan:
        return MemoryScan([{name: model[name]} for model in models], base and {name: base[name]}, rows, workers, chosen.unit)

    whole = MemoryScan(models, base, rows, workers, chosen.unit)
    measured: dict[str, Any] = {}
    if chosen.statistic is not None:
        shared = measure(whole) if chosen.scope == "model" else None
        measured = {name: shared if chosen.scope == "model" else measure(alone(name)) for name in models[0]}
    parts: dict[str, list[Tensor]] = {name: [] for name in models[0]}
    for piece in whole.pieces:
        inside = {"measured": measured.get(piece.name), "noise": Noise(seed, piece.name, piece.first), "first": piece.first}
        given = {name: inside[name] for name in chosen.inside}
        inputs = (piece.base, piece.models) if chosen.takes_base else (piece.models,)
        parts[piece.name].append(chosen.function(*inputs, **given, **arguments))
    return {name: torch.cat(found) if found[0].dim() else found[0] for name, found in parts.items()}


def merge_tensors(method: str, base: Tensor | None, *models: Tensor, rows: int | None = None, seed: int = 0, workers: int = 1, **options: object) -> Tensor:
    """The merge of one tensor."""
    wrapped = [{"x": model} for model in models]
    return merged(method, None if base is None else {"x": base}, wrapped, rows, seed, workers, **options)["x"]


def near(base: Tensor, count: int, step: float = 0.01, seed: int = 1) -> list[Tensor]:
    """Models near a base, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [(base.double() + step * torch.randn(base.shape, generator=generator, dtype=torch.float64)).to(base.dtype) for _ in range(count)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
