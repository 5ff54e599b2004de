"""What came of pruning: the zeros of a written checkpoint, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_plus.checkpoint import Checkpoint, copy_step

from .plan import DEFAULTS, PruneOptions, choose


def zeros_of(checkpoint: Checkpoint, how: PruneOptions = DEFAULTS) -> dict[str, tuple[int, int]]:
    """How many of each prunable weight's elements are zero, and how many there are; a few rows at a time."""
    found = {}
    for name in choose(checkpoint, how).names:
        parts = (checkpoint.read(name, rows) for rows in copy_step(checkpoint, name).slabs())
        found[name] = (sum(int((part == 0).sum()) for part in parts), checkpoint.specs[name].numel)
    return found


def sparsity_facts(asked: str, zeros: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The report as data: what was asked, and the zeros that there are, of all and of each weight."""
    met, size = (sum(counts) for counts in zip(*zeros.values(), strict=True))
    return {"asked": asked, "zeros": met, "weights": size, "share": met / size, "tensors": {name: {"zeros": z, "weights": n} for name, (z, n) in zeros.items()}}
