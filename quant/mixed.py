"""From a model and a budget to the scheme of each of its layers: measured, solved, and measured again.

Losses of single groups are not the loss of them together. So the allocation that is best by their sum is only the first of a few candidates: the
exact optimum, what is second best, the optima of slightly smaller budgets, and those of losses that are moved by as much as they are uncertain. All
of them are measured, on a part of the text that the losses were not measured on, and the best of these is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe
from mergekit_plus.progress import Progress, quiet

from .allocate import Solution, solve
from .layer_groups import file_size, stored_bits, weights_of
from .quantized import Scheme
from .replay import Replay
from .sensitivity import Group, Loader, Make, Sensitivities, parameters_of

SMALLER = (0.995, 0.99)  # of the bits above the cheapest allocation: where neighbours of the optimum are looked for
STRICTER = (0.9, 0.8)  # of the loss above the best allocation: for what is predicted need not be what is measured
LEFT_OUT = 200  # groups whose choice is forbidden in turn, for the second best

Selection = tuple[int, ...]
Packed = Callable[[Mapping[str, Scheme]], Checkpoint]  # the model with these schemes of modules, as it will be stored


@dataclass(frozen=True)
class Budget:
    """What an allocation must keep, one of them: stored bits of a quantised weight, scales and all; bytes of the weight files; or nats of KL."""

    bits_per_weight: float | None = None
    size: int | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.bits_per_weight, self.size, self.max_loss)) != 1:
            raise OptionError("give one of --bits-per-weight, --size and --max-loss")
        if any(value is not None and not 0 < value < math.inf for value in (self.bits_per_weight, self.max_loss)):
            raise OptionError("a budget is a number above 0")


@dataclass(frozen=True)
class Candidate:
    """An allocation, how it was come by, its stored bits, and its KL: predicted from single groups, and measured on held-out text."""

    origin: str
    selection: Selection
    cost: int
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Allocated:
    """The allocation that is kept, the solution of the sum of losses, and all that were measured; `weights` and `file_bytes` are of the whole."""

    chosen: Candidate
    solution: Solution
    candidates: tuple[Candidate, ...]
    weights: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a quantised weight."""
        return self.chosen.cost / self.weights


def schemes(checkpoint: Checkpoint, groups: Sequence[Group], choices: Sequence[Scheme], selection: Sequence[int]) -> dict[str, Scheme]:
    """The scheme of each module under an allocation."""
    roles = describe(checkpoint)
    return {roles.tensors[name].module: choices[choice] for group, choice in zip(groups, selection, strict=True) for name in group}


def allocate(
    checkpoint: Checkpoint, table: Sensitivities, budget: Budget, packed: Packed, format_name: str, *,
    make: Make | None = None, heldout: Tensor | None = None, count: int = 8, seed: int = 0, device: str = "cpu", progress: Progress | None = None,
) -> Allocated:  # fmt: skip
    """The best of `count` candidates on the held-out windows [windows, window], or the optimum by the sum of losses where there are none.

    Errors: OptionError for a budget that cannot be met, with the least that could be.
    """
    costs = stored_bits(checkpoint, table.groups, table.choices, format_name)
    weights = weights_of(checkpoint, table.groups)

    def size(selection: Sequence[int]) -> int:
        return file_size(packed(schemes(checkpoint, table.groups, table.choices, selection)))

    solution, bits = _solve(table, costs, budget_bits(checkpoint, table.groups, table.choices, budget, packed, format_name), budget, size)
    found = candidates(table, costs, solution, bits, budget.max_loss, count if heldout is not None else 1, seed)
    if budget.size is not None:
        found = [candidate for candidate in found if size(candidate.selection) <= budget.size]
    if heldout is not None and make is not None:
        found = measured(checkpoint, table, found, make, heldout, device, progress)
    chosen = _best(found, budget.max_loss)
    if budget.max_loss is not None and chosen.measured is not None and chosen.measured > budget.max_loss:
        what = f"no candidate keeps --max-loss {budget.max_loss:g} on held-out text; the best of them loses {chosen.measured:.4g} nats a token"
        warnings.warn(what, stacklevel=2)
    return Allocated(chosen, solution, tuple(found), weights, size(chosen.selection))


def budget_bits(
    checkpoint: Checkpoint, groups: Sequence[Group], choices: Sequence[Scheme], budget: Budget, packed: Packed, format_name: str
) -> int | None:
    """A budget in stored bits of the groups, but for a few digits in the headers of files; None for one of loss.

    Errors: OptionError for a budget that cannot be met, with the least that could be; nothing needs to be measured for it.
    """
    costs, weights = stored_bits(checkpoint, groups, choices, format_name), weights_of(checkpoint, groups)
    cheapest, least = tuple(row.index(min(row)) for row in costs), sum(map(min, costs))
    if budget.bits_per_weight is not None:
        if (bits := math.floor(budget.bits_per_weight * weights)) < least:
            what = f"the narrowest choices take {least / weights:.4f}, scales and all"
            raise OptionError(f"--bits-per-weight {budget.bits_per_weight:g} cannot be met: {what}")
        return bits
    if budget.size is not None:
        if (smallest := file_size(packed(schemes(checkpoint, groups, choices, cheapest)))) > budget.size:
            what = f"with the narrowest choices it is {smallest}, of which {least // 8} are quantized layers"
            raise OptionError(f"--size of {budget.size} bytes cannot be met: {what}")
        return least + 8 * (budget.size - smallest)
    return None


def _solve(
    table: Sensitivities, costs: list[list[int]], bits: int | None, budget: Budget, size: Callable[[Sequence[int]], int]
) -> tuple[Solution, int | None]:
    """The optimum by the sum of losses, and the budget in bits that it keeps."""
    if budget.max_loss is not None:
        most, lowest = budget.max_loss - table.base, math.fsum(map(min, table.losses))
        if most < lowest:
            raise OptionError(f"--max-loss {budget.max_loss:g} cannot be met: the widest choices lose {table.base + lowest:.4g} nats a token; add wider ones")
        return solve(table.losses, costs, max_loss=most), None
    assert bits is not None
    while True:  # headers have a few digits more or less
        solution = solve(table.losses, costs, bits)
        over = size(solution.choices) - budget.size if budget.size is not None else 0
        if over <= 0:
            return solution, bits
        bits -= 8 * over


def candidates(
    table: Sensitivities, costs: list[list[int]], solution: Solution, bits: int | None, max_loss: float | None, count: int, seed: int
) -> list[Candidate]:
    """The optimum and up to `count` - 1 allocations near it that keep the budget, each found by solving again."""
    losses = [list(row) for row in table.losses]
    most = None if max_loss is None else max_loss - table.base
    found: dict[Selection, str] = {solution.choices: "optimum"}

    def again(origin: str, losses: Sequence[Sequence[float]], share: float = 1.0) -> None:
        try:
            if bits is not None:
                least = sum(map(min, costs))
                answer = solve(losses, costs, math.floor(least + share * (bits - least)), seconds=2)
            else:
                assert most is not None
                lowest = math.fsum(map(min, losses))
                answer = solve(losses, costs, max_loss=lowest + share * (most - lowest), seconds=2)
        except OptionError:  # nothing is left within the budget
            return
        found.setdefault(answer.choices, origin)

    draw = np.random.default_rng(seed)
    wanted = max(1, (count - 1) // 3)
    for _ in range(2 * wanted if count > 1 else 0):
        if len(found) <= wanted:
            pairs = zip(losses, table.errors, strict=True)
            again("noise", [[loss + error * draw.standard_normal() for loss, error in zip(*rows, strict=True)] for rows in pairs])
    for share in (SMALLER if max_loss is None else STRICTER) if count > 1 else ():
        if len(found) <= 2 * wanted:
            again("smaller budget" if max_loss is None else "smaller loss", losses, share)
    runners_up = _second_best(losses, costs, solution, bits, most) if len(found) < count else []
    for selection in runners_up:
        found.setdefault(selection, "second best")
    return [
        Candidate(origin, selection, sum(row[choice] for row, choice in zip(costs, selection, strict=True)), table.predicted(selection))
        for selection, origin in list(found.items())[:count]
    ]


def _second_best(losses: list[list[float]], costs: list[list[int]], solution: Solution, bits: int | None, most: float | None) -> list[Selection]:
    """The best allocations that differ from the optimum, best first: the optima where one group may not have its choice."""
    found = []
    for group in range(0, len(losses), max(1, len(losses) // LEFT_OUT)):
        choice = solution.choices[group]
        others = [*losses[:group], [math.inf if number == choice else loss for number, loss in enumerate(losses[group])], *losses[group + 1 :]]
        if all(loss == math.inf for loss in others[group]):
            continue
        try:
            answer = solve(others, costs, bits, max_loss=most, seconds=2)
        except OptionError:
            continue
        found.append((answer.objective, answer.cost, answer.choices))
    return [choices for _, _, choices in sorted(found)]


def measured(
    checkpoint: Checkpoint, table: Sensitivities, found: Sequence[Candidate], make: Make, heldout: Tensor, device: str, progress: Progress | None = None
) -> list[Candidate]:
    """The candidates with their KL on the held-out windows. Memory: the model in float32, and in its own dtype once for each choice."""
    progress, roles = progress or quiet(), describe(checkpoint)
    where = [parameters_of(roles, group) for group in table.groups]
    replay = Replay(load_model(checkpoint).to(device), heldout)
    loader = Loader(checkpoint, make, where)
    used = sorted({choice for candidate in found for choice in candidate.selection})
    banks = {number: loader.weights(table.choices[number]) for number in used}
    done = []
    with progress.phase("candidates", len(found), " allocations"):
        for candidate in found:
            for names, choice in zip(where, candidate.selection, strict=True):
                replay.fill({name: banks[choice][name] for name in names})
            done.append(replace(candidate, measured=float(replay.divergence().mean())))
            progress.advance(1)
    return done


def _best(found: Sequence[Candidate], max_loss: float | None) -> Candidate:
    """The least measured loss; in the dual the cheapest within the loss, or the one that comes nearest. The optimum where nothing was measured."""
    if found[0].measured is None:
        return found[0]

    def loss(candidate: Candidate) -> float:
        return math.inf if candidate.measured is None else candidate.measured

    if max_loss is not None and (within := [candidate for candidate in found if loss(candidate) <= max_loss]):
        return min(within, key=lambda candidate: (candidate.cost, loss(candidate)))
    return min(found, key=loss)
