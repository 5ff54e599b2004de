"""Which blocks to remove: gates, influence and leave-one-out beside the best of all sets, before a cure and after it.

    python benchmarks/fold.py --work FOLDER [--model MODEL --calibration FILE --train FILE --validation FILE --test FILE]    # goes on where it was stopped
    python benchmarks/fold.py --work FOLDER --render table.md                                                                # and the same arguments

By default the model and the texts are those of tests/models. For each number of blocks, every set of them is taken out and measured on the calibration text
(16 windows of 256 tokens): the best one is what importance looks for. Each chosen set is measured on the first 20 windows of 256 tokens of the validation and
the first 40 of the test text, and again when it is cured: norms and MaskLoRA of rank 16 trained towards the model as it was, the same windows of 128 tokens for
all, at the rate of three that the validation text likes best for the best of the largest sets. FOLDER keeps `results.jsonl` and the cured models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.calibration import read_text
from mergekit_plus.calibration.options import CalibrationOptions
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.depths import DepthOptions, plan_depth
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.training import TrainOptions
from prune.fold import Fold, folded, importance, stack_of
from prune.fold.blocks import Blocks, blocks_of
from prune.fold.measure import BATCH, losses
from prune.fold.scale import rescaled
from prune.retrain import RetrainOptions, retrain

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"
METHODS = ("best", "leave-one-out", "influence", "gates")
RATES = (1e-3, 3e-3, 1e-2)
CURE = TrainOptions(steps=40, batch=4, evaluations=1, autocast=True)
WINDOW = 128  # tokens, of the cure
WINDOWS = {"validation": 20, "test": 40}  # of 256 tokens
Row = dict[str, Any]


class Bench:
    """The model, the texts, and the results so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.work: Path = given.work
        self.checkpoint, self.training, self.most = Checkpoint.open(given.model), replace(CURE, steps=given.steps), given.remove
        tokenizer = load_tokenizer(self.checkpoint)
        self.calibration = read_text(given.calibration, tokenizer, given.windows, 256)
        self.text = CalibrationOptions(texts=list(map(str, given.calibration)), windows=given.windows, window=256)
        self.rows = read_text(given.train, tokenizer, 1 << 30, WINDOW)
        self.texts = {name: tokenize(tokenizer, getattr(given, name).read_text()) for name in ("validation", "test")}
        self.count = len(stack_of(self.checkpoint).layers)
        self.done = read(self.work / "results.jsonl")
        self._blocks: Blocks | None = None

    @property
    def blocks(self) -> Blocks:
        """Of the model in memory."""
        self._blocks = self._blocks or blocks_of(load_model(self.checkpoint), self.checkpoint)
        return self._blocks

    def once(self, key: Mapping[str, Any], compute: Callable[[], Row]) -> Row:
        """The row of a key, computed unless it is there."""
        for row in self.done:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        started = time.process_time()
        row = {**key, **compute(), "seconds": round(time.process_time() - started, 1)}
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.append(row)
        print(str(row)[:300], flush=True)
        return row

    # ---- which blocks ----

    def every(self) -> list[tuple[int, ...]]:
        return [blocks for count in range(1, self.most + 1) for blocks in combinations(range(self.count), count)]

    def without(self, removed: Sequence[int]) -> Fold:
        return Fold.of([block for block in range(self.count) if block not in removed])

    def exhaustive(self) -> dict[tuple[int, ...], float]:
        """The loss on the calibration text without each set of blocks, measured a portion of the text at a time."""
        sets = self.every()
        total = [0.0] * len(sets)
        for number, part in enumerate(torch.split(self.calibration, BATCH)):
            row = self.once({"what": "all sets", "part": number}, lambda part=part: {"losses": self._losses(part, sets)})
            total = [known + loss * len(part) / len(self.calibration) for known, loss in zip(total, row["losses"], strict=True)]
        return dict(zip(sets, total, strict=True))

    def _losses(self, part: Tensor, sets: Sequence[Sequence[int]]) -> list[float]:
        return [round(loss, 6) for loss in losses(self.blocks, [self.without(removed) for removed in sets], part)]

    def chosen(self, by: str, count: int, table: Mapping[tuple[int, ...], float]) -> tuple[int, ...]:
        """The blocks that a method takes out; leaving out takes them from the table, which has all that it would measure."""
        if by in ("best", "leave-one-out"):
            return best(table, count) if by == "best" else greedy(table, count)

        def compute() -> Row:
            found = importance(self.blocks, self.calibration, count, by)
            return {"blocks": list(found.removed), "scores": [round(score, 5) for score in found.scores]}

        return tuple(self.once({"what": "chosen", "by": by, "removed": count}, compute)["blocks"])

    # ---- models ----

    def measure(self, checkpoint: Checkpoint) -> Row:
        """The losses of a model on both texts, in nats a token."""
        model = load_model(checkpoint)
        return {text: perplexity(model, ids, window=256, limit=WINDOWS[text]).nll for text, ids in self.texts.items()}

    def measured(self, name: str, make: Callable[[], Checkpoint], rate: float | None = None) -> Row:
        return self.once({"what": "loss", "model": name, **({"rate": rate} if rate else {})}, lambda: self.measure(make()))

    def cured(self, name: str, make: Callable[[], Checkpoint], rate: float, train: Sequence[str] = ("norms", "mask_lora")) -> Checkpoint:
        """A model, retrained towards the one that it was made from, and kept."""
        folder = self.work / f"{name} {self.training.steps} {rate:g}".replace(" ", "-").replace(",", "")
        if not folder.exists():
            options = RetrainOptions(tuple(train), self.rows, {}, replace(self.training, lr=rate))
            save(retrain(make(), options, self.checkpoint), folder)
        return Checkpoint.open(folder)

    def rate(self, removed: Sequence[int]) -> float:
        """The rate that is best on the validation text for a model without these blocks."""
        rows = {rate: self.tried(removed, rate) for rate in RATES}
        return min(RATES, key=lambda rate: rows[rate]["validation"])

    def tried(self, removed: Sequence[int], rate: float) -> Row:
        name = f"without {shown(removed)}"
        return self.measured(f"{name}, cured", lambda: self.cured(name, lambda: folded(self.checkpoint, self.without(removed)), rate), rate)

    def run(self) -> None:
        self.measured("dense", lambda: self.checkpoint)
        table = self.exhaustive()
        counts = range(1, self.most + 1)
        rate = self.rate(best(table, self.most))
        for by in METHODS:
            for count in counts:
                removed = self.chosen(by, count, table)
                self.measured(f"without {shown(removed)}", lambda removed=removed: folded(self.checkpoint, self.without(removed)))
                self.tried(removed, rate)
            if by == "leave-one-out":
                self.scaled([best(table, count) for count in counts], rate)
                self.planned(table)

    def scaled(self, sets: Sequence[tuple[int, ...]], rate: float) -> None:
        """Their residual branches scaled; the last of them cured too."""

        def make(removed: tuple[int, ...]) -> Checkpoint:
            fold = self.without(removed)
            return rescaled(self.checkpoint, folded(self.checkpoint, fold), fold, self.calibration)

        for removed in sets:
            self.measured(f"without {shown(removed)}, scaled", lambda removed=removed: make(removed))
        name = f"without {shown(sets[-1])}, scaled"
        self.measured(f"{name}, cured", lambda: self.cured(name, lambda: make(sets[-1]), rate), rate)

    def planned(self, table: Mapping[tuple[int, ...], float]) -> None:
        """A depth plan that takes out as many blocks as the largest set, and what it loses on the calibration text."""

        def compute() -> Row:
            text = self.text.model_copy(update={"window": WINDOW})
            options = DepthOptions(text, operations=(self.count - self.most + 0.5) / self.count, overwrite=True)
            found = plan_depth(self.checkpoint, options, self.work / "plan.yaml")
            removed = tuple(block for block in range(self.count) if block not in found.plan.kept)
            candidates = [[one.predicted, one.measured] for one in found.candidates]
            return {"blocks": list(removed), "groups": found.plan.groups, "candidates": candidates, "calibration": table.get(removed)}

        self.once({"what": "planned", "removed": self.most}, compute)


def best(table: Mapping[tuple[int, ...], float], count: int) -> tuple[int, ...]:
    """The set of so many blocks without which the loss is least."""
    return min((removed for removed in table if len(removed) == count), key=lambda removed: table[removed])


def greedy(table: Mapping[tuple[int, ...], float], count: int) -> tuple[int, ...]:
    """What leaving out comes to: the best block, then the best one beside it."""
    found: tuple[int, ...] = ()
    for size in range(1, count + 1):
        found = min((removed for removed in table if len(removed) == size and set(found) <= set(removed)), key=lambda removed: table[removed])
    return found


def shown(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def render(bench: Bench) -> list[str]:
    """Losses on the test text of what was measured so far, before a cure and after it, and what scales change."""
    found = {(row["model"], row.get("rate")): row["test"] for row in bench.done if row["what"] == "loss"}
    gone = {(row["by"], row["removed"]): row["blocks"] for row in bench.done if row["what"] == "chosen"}
    table, counts = bench.exhaustive(), range(1, bench.most + 1)
    for count in counts:
        gone |= {("best", count): best(table, count), ("leave-one-out", count): greedy(table, count)}
    rate = bench.rate(best(table, bench.most))

    def cell(by: str, count: int) -> str:
        name = f"without {shown(gone.get((by, count), ()))}"
        values = [f"{found[key]:.3f}" for key in ((name, None), (f"{name}, cured", rate)) if key in found]
        return f"{shown(gone[by, count])}: {', '.join(values)}" if (by, count) in gone else ""

    lines = [f"Dense: {found['dense', None]:.3f}; rate of the cure: {rate:g}.", "", f"| removed | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    lines += [f"| {count} | {' | '.join(cell(by, count) for by in METHODS)} |" for count in counts]
    lines += ["", "| removed | as it is | scaled |", "|---|---|---|"]
    for count in counts:
        for more, key in (("", None), (", cured", rate)):
            names = [f"without {shown(gone['best', count])}{scaled}{more}" for scaled in ("", ", scaled")]
            if all((name, key) in found for name in names):
                lines.append(f"| {shown(gone['best', count])}{more} | {' | '.join(f'{found[name, key]:.3f}' for name in names)} |")
    return lines


def arguments(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODELS / "base")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[MODELS / "text" / "docs.val.txt"])
    parser.add_argument("--train", type=Path, nargs="+", default=[MODELS / "text" / "docs.val.txt"])
    parser.add_argument("--validation", type=Path, default=MODELS / "text" / "code.val.txt")
    parser.add_argument("--test", type=Path, default=MODELS / "text" / "docs.test.txt")
    parser.add_argument("--remove", type=int, default=4, help="blocks at most")
    parser.add_argument("--windows", type=int, default=16, help="of the calibration text, 256 tokens each")
    parser.add_argument("--steps", type=int, default=CURE.steps, help="of the cure, 4 windows of 128 tokens each")
    return parser


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--render", type=Path, help="write the table of what is measured to this file")
    given = parser.parse_args()
    if given.render:
        given.render.write_text("\n".join(render(Bench(given))) + "\n")
        return
    given.work.mkdir(parents=True, exist_ok=True)
    Bench(given).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
