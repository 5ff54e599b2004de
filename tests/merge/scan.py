"""An in-memory Scan: a dict of tensors a model, cut into pieces of some rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Piece = tuple[int, Tensor | None, list[Tensor]]


@dataclass
class MemoryScan:
    """The tensors of `models` (and `base`), names in the base's order, cut into pieces of `rows` rows; counts its passes."""

    models: Sequence[Mapping[str, Tensor]]
    base: Mapping[str, Tensor] | None = None
    rows: int | None = None
    workers: int = 1
    sampled: int = 0
    passes: int = 0

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.models[0].values())

    def pieces(self) -> list[tuple[str, Piece]]:
        """(name, (flat index of the first element, base, models)) of every piece."""
        found: list[tuple[str, Piece]] = []
        for name, tensor in self.models[0].items():
            height = tensor.shape[0] if tensor.dim() else 1
            step = self.rows if self.rows and tensor.dim() else max(1, height)
            for start in range(0, max(1, height), step):
                cut = slice(start, start + step) if tensor.dim() else ...
                base = None if self.base is None else self.base[name][cut]
                first = start * (tensor.numel() // max(1, height))
                found.append((name, (first, base, [model[name][cut] for model in self.models])))
        return found

    def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False) -> list[Any]:
        pieces = [piece for _, piece in self.pieces()]
        if sample:
            self.sampled += 1
            pieces = pieces[::16]
        else:
            self.passes += 1
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda piece: function(piece[1], piece[2]), pieces))


def one(*models: Tensor, base: Tensor | None = None, rows: int | None = None) -> MemoryScan:
    """The scan of a single tensor of each model."""
    return MemoryScan([{"x": model} for model in models], None if base is None else {"x": base}, rows)
