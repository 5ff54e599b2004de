"""Depth plans: which blocks of a model go and which share, within a budget, by what each change costs on a text.

The items are runs of three neighbouring blocks, and the choices of an item all that can become of its blocks: each subset of them, and each way
in which neighbours of the subset share one set of linear weights; 14 for three blocks. So whether "shares with the one before" has one before that stays never
has to be asked, and what blocks of an item do to each other is measured with them. What it costs is that no two items share across their border, and
that losses of different items are taken to add up. They do not: so every choice is measured once more, with the other items as the first solution has
them, and what comes out is measured whole, beside its neighbours, on windows that no loss was measured on.

The program is that of `quant.allocate`: one choice for each item, of least summed loss, within bytes and operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from prune.fold import Fold, kinds_of, shareable, stack_of
from prune.fold.blocks import Blocks, load_blocks
from prune.fold.measure import losses
from prune.fold.plan_file import FoldPlan, write
from quant.allocate import solve

from .calibration.options import CalibrationOptions
from .checkpoint import Checkpoint
from .errors import OptionError, OutputError
from .progress import Progress, quiet

ITEM = 3  # neighbouring blocks of which what becomes is one choice
ROUNDS = 2  # of measuring and solving
HELD_OUT = 3  # of so many windows one is for choosing among candidates
Choice = tuple[tuple[int, ...], ...]  # the blocks of an item that stay, those together that share


@dataclass(frozen=True)
class DepthOptions:
    """Within what to plan, on which text. Budgets are shares: of the model's bytes, and of the weights that its blocks multiply with for a token."""

    calibration: CalibrationOptions
    budget: float | None = None
    operations: float | None = None
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class Costs:
    """Of each block: bytes of what can be shared, bytes of what cannot, and weights of its linear layers; bytes outside of all blocks."""

    shared: tuple[int, ...]
    private: tuple[int, ...]
    weights: tuple[int, ...]
    outside: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Costs:
        """Those of a model, from its headers. Errors: as `stack_of`."""
        part = stack_of(checkpoint)
        inside = shareable(checkpoint, part)
        layers = [[checkpoint.specs[name] for name in layer] for layer in part.layers]
        shared = tuple(sum(spec.nbytes for spec in layer if spec.name in inside) for layer in layers)
        private = tuple(sum(spec.nbytes for spec in layer if spec.name not in inside) for layer in layers)
        weights = tuple(sum(spec.numel for spec in layer if spec.name in inside and len(spec.shape) > 1) for layer in layers)
        return cls(shared, private, weights, checkpoint.nbytes - sum(shared) - sum(private))

    def bytes(self, choice: Choice) -> int:
        """What blocks take that are stored so, those that share once."""
        return sum(self.shared[piece[0]] + sum(self.private[block] for block in piece) for piece in choice)

    def operations(self, choice: Choice) -> int:
        """Weights that a token is multiplied with; sharing saves none."""
        return sum(self.weights[block] for piece in choice for block in piece)


@dataclass(frozen=True)
class Candidate:
    """A choice for each item, and what it loses to the whole model, nats a token: as the program adds it up, and as measured on the windows held out."""

    origin: str
    choices: tuple[int, ...]
    predicted: float
    measured: float


@dataclass(frozen=True)
class Planned:
    """The plan and its file; candidates as measured, the chosen one first."""

    out: Path
    plan: FoldPlan
    candidates: tuple[Candidate, ...]
    bytes: float  # shares of the model's
    operations: float


def choices_of(blocks: Sequence[int]) -> list[Choice]:
    """All that can become of neighbouring blocks: all of them first, none of them last."""
    kept = [subset for count in range(len(blocks), -1, -1) for subset in combinations(blocks, count)]
    return [pieces for subset in kept for pieces in _pieces(subset)]


def _pieces(blocks: tuple[int, ...]) -> list[Choice]:
    """Ways to cut a row of blocks into neighbours that share: no sharing first."""
    if not blocks:
        return [()]
    return [(blocks[:size], *rest) for size in range(1, len(blocks) + 1) for rest in _pieces(blocks[size:])]


def fold_with(choices: Sequence[Choice]) -> Fold:
    """The fold that these choices are; blocks that share have the weights of the first."""
    pieces = [piece for choice in choices for piece in choice]
    groups = [group for group, piece in enumerate(pieces) for _ in piece]
    return Fold(tuple(block for piece in pieces for block in piece), tuple(groups), tuple(piece[0] for piece in pieces))


def plan_depth(checkpoint: Checkpoint, options: DepthOptions, out: Path, progress: Progress | None = None) -> Planned:
    """Measure, solve, measure again, and write `out`; the model is in memory in float32.

    Errors: OutputError where `out` exists; OptionError for budgets that cannot be met and a text of fewer than three windows; CheckpointError as `stack_of`.
    """
    progress = progress or quiet()
    if out.exists() and not options.overwrite:
        raise OutputError(f"{out} exists already; name another output with -o, or replace it with --overwrite")
    costs = Costs.of(checkpoint)
    blocks = len(costs.shared)
    items = [range(first, min(first + ITEM, blocks)) for first in range(0, blocks, ITEM)]
    kinds = kinds_of(checkpoint)
    table = [
        [choice for choice in choices_of(item) if (choice or len(items) > 1) and all(len({kinds[block] for block in piece}) == 1 for piece in choice)]
        for item in items
    ]
    limits = _limits(costs, table, options)
    rows, _ = options.calibration.read(checkpoint)
    if len(rows) < HELD_OUT:
        raise OptionError(f"the calibration text has {len(rows)} windows; give at least {HELD_OUT}, one of which chooses among candidates")
    heldout = rows[HELD_OUT - 1 :: HELD_OUT]
    rows = rows[[number for number in range(len(rows)) if number % HELD_OUT != HELD_OUT - 1]]
    bench = _Bench(load_blocks(checkpoint, rows, options.device, progress), table, limits, rows.to(options.device), heldout.to(options.device), progress)
    whole = standing = (0,) * len(items)
    (base,) = bench.losses([whole], bench.rows)
    found: dict[tuple[int, ...], tuple[str, float]] = {}
    for number in range(ROUNDS):
        measured = [[loss - base for loss in row] for row in bench.measured(standing)]
        solutions = bench.solutions(measured, standing)
        for place, (chosen, predicted) in enumerate(solutions):
            found.setdefault(chosen, (f"round {number + 1}, {f'beside it, {place}' if place else 'optimum'}", predicted))
        standing = solutions[0][0]
    dense, *values = bench.losses([whole, *found], bench.heldout)
    candidates = [Candidate(origin, chosen, predicted, value - dense) for (chosen, (origin, predicted)), value in zip(found.items(), values, strict=True)]
    candidates.sort(key=lambda one: one.measured)
    picked = bench.picked(candidates[0].choices)
    shares = (costs.outside + sum(map(costs.bytes, picked))) / checkpoint.nbytes, sum(map(costs.operations, picked)) / sum(costs.weights)
    plan = FoldPlan.of(fold_with(picked), blocks, _made(checkpoint, options, shares, candidates[0], table, measured))
    write(out, plan)
    return Planned(out, plan, tuple(candidates), *shares)


def _limits(costs: Costs, table: Sequence[Sequence[Choice]], options: DepthOptions) -> list[tuple[list[list[int]], int]]:
    """Of each budget what every choice costs, and what is to be had. Errors: OptionError where no budget is given, or one cannot be met."""
    found = []
    whole = costs.outside + sum(costs.shared) + sum(costs.private)
    for name, share, cost, total, fixed in (
        ("budget", options.budget, costs.bytes, whole, costs.outside), ("operations", options.operations, costs.operations, sum(costs.weights), 0)
    ):  # fmt: skip
        if share is None:
            continue
        each = [[cost(choice) for choice in choices] for choices in table]
        one = min(cost for row in each for cost in row if cost)  # a block stays
        if not 0 < share < 1 or int(share * total) < fixed + one:
            raise OptionError(f"--{name} {share:g}: a share between {(fixed + one) / total:.3f}, for one block, and 1")
        found.append((each, int(share * total) - fixed))
    if not found:
        raise OptionError("give a budget: a share of the model's bytes, or of its operations")
    return found


@dataclass
class _Bench:
    """The model, the choices, what they may cost, and the two parts of the text."""

    blocks: Blocks
    table: list[list[Choice]]
    limits: list[tuple[list[list[int]], int]]
    rows: Tensor
    heldout: Tensor
    progress: Progress

    def picked(self, chosen: Sequence[int]) -> list[Choice]:
        return [choices[number] for choices, number in zip(self.table, chosen, strict=True)]

    def losses(self, candidates: Sequence[Sequence[int]], rows: Tensor) -> list[float]:
        """The losses of whole plans on a part of the text."""
        return losses(self.blocks, [fold_with(self.picked(chosen)) for chosen in candidates], rows, self.progress)

    def measured(self, standing: tuple[int, ...]) -> list[list[float]]:
        """The loss of every choice, the other items standing so; infinite where no block would be left."""
        plans = {(item, number): (*standing[:item], number, *standing[item + 1 :]) for item, row in enumerate(self.table) for number in range(len(row))}
        folds = {key: fold_with(self.picked(chosen)) for key, chosen in plans.items()}
        able = [key for key, fold in folds.items() if fold.kept]
        values = dict(zip(able, losses(self.blocks, [folds[key] for key in able], self.rows, self.progress), strict=True))
        return [[values.get((item, number), float("inf")) for number in range(len(choices))] for item, choices in enumerate(self.table)]

    def solutions(self, measured: Sequence[Sequence[float]], standing: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
        """The choices of least summed loss, then for each item the best ones without its own of them; with what they should lose."""
        start = measured[0][standing[0]]
        (first, *_) = found = [self._solution(measured)]
        for item, choice in enumerate(first):
            closed = [list(row) for row in measured]
            closed[item][choice] = float("inf")
            try:
                found.append(self._solution(closed))
            except OptionError:  # nothing else fits
                continue
        able = [chosen for chosen in dict.fromkeys(found) if fold_with(self.picked(chosen)).kept]
        if not able:
            raise OptionError("within this budget nothing is better than no block at all; allow more")
        return [(chosen, start + sum(row[choice] - start for row, choice in zip(measured, chosen, strict=True))) for chosen in able]

    def _solution(self, measured: Sequence[Sequence[float]]) -> tuple[int, ...]:
        (costs, budget), *second = self.limits
        return solve(measured, costs, budget, second=second[0] if second else None).choices


def _made(
    checkpoint: Checkpoint, options: DepthOptions, shares: tuple[float, float], chosen: Candidate, table: Sequence[Sequence[Choice]],
    measured: Sequence[Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """What plan.yaml says of how it was made; losses are nats a token above those of the whole model."""
    from mergekit_plus import __version__

    return {
        "by": f"mergekit-plus {__version__}",
        "model": checkpoint.ref,
        "text": {**options.calibration.model_dump(mode="json", exclude={"sha256", "order"}, exclude_none=True), "sha256": options.calibration.digests()},
        "asked": {name: value for name in ("budget", "operations") if (value := getattr(options, name)) is not None},
        "bytes": round(shares[0], 6), "operations": round(shares[1], 6),
        "predicted": round(chosen.predicted, 6), "measured": round(chosen.measured, 6),
        "losses": [
            {" ".join("+".join(map(str, piece)) for piece in choice) or "none": round(loss, 6) for choice, loss in zip(choices, row, strict=True)}
            for choices, row in zip(table, measured, strict=True)
        ],
    }  # fmt: skip


def facts(planned: Planned) -> dict[str, Any]:
    """What was planned, as data; blocks that share stand together, as in 3+4."""
    plan = planned.plan
    pieces = ["+".join(map(str, plan.fold.members(group))) for group in range(len(plan.parents))]
    return {
        "out": str(planned.out), "blocks": " ".join(pieces), "kept": plan.kept, "groups": plan.groups, "parents": plan.parents,
        "bytes": planned.bytes, "operations": planned.operations, "loss": planned.candidates[0].measured,
        "candidates": [
            {"candidate": f"{one.origin}{' *' * (not place)}", "predicted": one.predicted, "measured": one.measured}
            for place, one in enumerate(planned.candidates)
        ],
    }  # fmt: skip
