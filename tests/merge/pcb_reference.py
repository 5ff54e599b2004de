"""PCB-Merging in float64 with whole vectors in memory, written from specs/merge_prune_fold.md 1.2 and 1.5 and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass
class Reference:
    tau: Vector  # [D], the merged task vector
    clipped: list[Vector]  # the winsorised task vectors of the tasks that take part
    weights: list[Vector]  # their weights


def pcb(vectors: list[Vector], lambdas: list[float], ratio: float = 0.1, winsor: float = 0.01, inter: str = "sum", exclude_frozen: bool = False) -> Reference:
    """The merged task vector of `vectors`, each [D]."""
    size = vectors[0].size
    counted = np.any([vector != 0 for vector in vectors], axis=0) if exclude_frozen else np.ones(size, bool)
    total = int(counted.sum())
    tasks = []
    for vector, scale in zip(vectors, lambdas, strict=True):
        ascending = np.sort(np.abs(vector[counted]))
        low_rank, high_rank = (int(total * winsor), int(total * (1 - winsor) - 1)) if total * winsor >= 1 else (0, total - 1)
        if total and ascending[low_rank] < ascending[max(low_rank, high_rank)]:
            low, high = ascending[low_rank], ascending[high_rank]
            magnitude = np.clip(np.abs(vector), low, high)
            tasks.append((vector, np.sign(vector) * magnitude, (magnitude - low) / (high - low), scale))
    count = len(tasks)
    normal = [np.sign(vector) * place for vector, _, place, _ in tasks]
    top, bottom = np.zeros(size), np.zeros(size)
    weights = []
    for index, (vector, clipped, place, scale) in enumerate(tasks):
        if inter == "sum":
            rival = np.tanh(vector * sum(other for other, *_ in tasks))
        elif inter == "normalized":
            rival = np.tanh(vector * sum(normal))
        else:
            rival = sum(np.tanh(normal[index] * other) for other in normal)
        score = np.exp(count * place**2) * rival
        ascending = np.sort(score[counted])
        drop, best = ascending[min(int(total * (1 - ratio)), total - 1)], ascending[-1]
        weight = (np.clip(score, drop, best) - drop) / (best - drop) if best > drop else (score >= best).astype(np.float64)
        weights.append(weight)
        top += scale * clipped * weight
        bottom += weight
    return Reference(top / np.maximum(bottom, 1e-12), [clipped for _, clipped, _, _ in tasks], weights)
