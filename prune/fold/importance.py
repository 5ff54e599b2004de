"""How much each block of a model counts, by what becomes of a text without it: gates, block influence, leave-one-out.

    found = importance(model, blocks_of(model, checkpoint), rows, remove=3, method="gates")
    found.removed                                                  # the three blocks to take out

gates: one number a block, trained under a removal rate while all weights stay, so that a block counts for what it does beside the others. The paper's
form of the gate and of its objective are not known. A gate here weakens what its block adds to the hidden states, h + g (block(h) - h); the gates are
sigmoids with a common threshold that holds their sum at the number of blocks that stay, and a falling temperature drives them to 0 and 1. (A gate
a^2 / (a^2 + epsilon) with a price on missing the rate, as in GDP, moved as one and did not part on our models.)
influence: one minus the mean cosine between what enters a block and what leaves it (ShortGPT, arXiv 2403.03853).
leave-one-out: the block without which the loss is least goes, then the next one among those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.errors import OptionError, nearest
from mergekit_plus.progress import Progress, quiet
from mergekit_plus.training import TrainOptions, loss_on, next_token, train

from .blocks import Blocks
from .measure import losses
from .surgery import Fold

TEMPERATURE = (1.0, 0.05)  # of gates, at the first step and at the last
# SGD, not Adam, which moves every gate at one speed, however much less the loss asks of one than of another.
GATING = TrainOptions(steps=100, lr=0.5, batch=4, schedule="constant", warmup=0.0, optimizer="sgd", clip=None, dropout=False)


@dataclass(frozen=True)
class Importance:
    """What was measured: a score of each block, the larger the more it counts, and the blocks that are to go, in ascending order."""

    method: str
    scores: tuple[float, ...]
    removed: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The other blocks."""
        return tuple(number for number in range(len(self.scores)) if number not in self.removed)


# ---- the methods: blocks, those that may go, rows, how many do, seed -> a score of each block, and which go where the scores do not tell ----

Method = Callable[[Blocks, Sequence[int], Tensor, int, int, Progress], tuple[list[float], Sequence[int] | None]]


def by_gates(blocks: Blocks, free: Sequence[int], rows: Tensor, remove: int, seed: int, progress: Progress) -> tuple[list[float], None]:
    """Gates that are trained together; the smallest go."""
    alpha = nn.Parameter(torch.zeros(len(blocks)))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    def gates() -> Tensor:
        """Of the free blocks sigmoid((alpha - t) / temperature), with t such that their sum leaves out `remove` blocks; 1 of the others."""
        temperature = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** (done / GATING.steps)
        own, open_share = alpha[list(free)] / temperature, 1 - remove / len(free)
        low, high = float(own.detach().min()) - 50, float(own.detach().max()) + 50
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(torch.sigmoid(own.detach() - middle).mean()) > open_share else (low, middle)
        first = torch.sigmoid(own - low)
        slope = (first * (1 - first)).mean().detach().clamp_min(1e-6)
        gate = torch.sigmoid(own - low - (first.mean() - open_share) / slope)  # one step of Newton's: t follows alpha
        return torch.ones(len(blocks)).index_copy(0, torch.tensor(list(free)), gate)

    def loss(model: Any, part: Tensor) -> Tensor:
        opened = gates().to(part.device)
        with blocks.gated(opened):
            return next_token(model, part)

    train(blocks.model, {"gates": alpha}, loss, rows, replace(GATING, batch=min(GATING.batch, len(rows)), seed=seed), after_step=count, progress=progress)
    return gates().tolist(), None


def by_influence(blocks: Blocks, free: Sequence[int], rows: Tensor, remove: int, seed: int, progress: Progress) -> tuple[list[float], None]:
    """One minus the mean cosine of what enters and what leaves, over all tokens, in float32; a zero vector has the cosine 0."""
    totals = torch.zeros(len(blocks), dtype=torch.float64)

    def see(number: int, entering: Tensor, leaving: Tensor) -> Tensor:
        totals[number] += functional.cosine_similarity(entering.float(), leaving.float(), dim=-1).double().sum().item()
        return leaving

    with blocks.changed(see):
        loss_on(blocks.model, rows)
    return (1 - totals / rows.numel()).tolist(), None


def by_leaving_out(blocks: Blocks, free: Sequence[int], rows: Tensor, remove: int, seed: int, progress: Progress) -> tuple[list[float], list[int]]:
    """The loss without each block alone, and the blocks that go one after the other, each the one whose going costs least beside those that are gone."""
    removed: list[int] = []
    first: list[float] = []
    while len(removed) < remove or not first:
        numbers = [number for number in (free if first else range(len(blocks))) if number not in removed]
        folds = [Fold.of([block for block in range(len(blocks)) if block not in (*removed, number)]) for number in numbers]
        found = dict(zip(numbers, losses(blocks, folds, rows, progress), strict=True))
        first = first or list(found.values())
        if remove:
            removed.append(min((number for number in found if number in free), key=lambda number: found[number]))
    return first, removed


SCORES: dict[str, Method] = {"gates": by_gates, "influence": by_influence, "leave-one-out": by_leaving_out}


def importance(
    blocks: Blocks, rows: Tensor, remove: int, method: str, *, pinned: Sequence[int] = (), seed: int = 0, progress: Progress | None = None
) -> Importance:
    """Which `remove` blocks of a model count least on a text, rows: int64 [windows, window]; `pinned` blocks stay.

    Errors: OptionError for an unknown method, and where fewer blocks would be left than one.
    """
    if method not in SCORES:
        raise OptionError(f"unknown importance '{method}'.{nearest(method, SCORES)}")
    free = [number for number in range(len(blocks)) if number not in pinned]
    if not 0 <= remove < len(blocks) or remove > len(free):
        raise OptionError(f"{remove} of {len(blocks)} blocks cannot be removed{f', {len(pinned)} of them pinned' if pinned else ''}; leave one at least")
    scores, removed = SCORES[method](blocks, free, rows, remove, seed, progress or quiet())
    if removed is None:
        removed = sorted(free, key=lambda number: (scores[number], number))[:remove]
    return Importance(method, tuple(scores), tuple(sorted(removed)))
