"""How good each merge method is on fine-tunes of one base, with its default options and with options searched at equal budget.

    python benchmarks/merge_quality.py --models MODELS --texts TEXTS --cache results.jsonl

MODELS holds `base` and the fine-tunes, TEXTS a `<fine-tune>.val.txt` and a `<fine-tune>.test.txt` of each. Options are searched on the validation
texts (`compress merge --search`, the mean of the log perplexities over 3 windows of 256 tokens of each); the result is measured on the test texts, in
16 windows of 256 tokens of each. Windows are spread evenly over their text. The normalised loss of a text is `(base - loss) / (base - expert)` in nats:
0 is the base, 1 the text's own fine-tune. Every method that takes so many models is run; each result goes into the cache at once, and what is
there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.evaluate import load_model, load_tokenizer, tokenize
from mergekit_plus.merge import METHODS
from mergekit_plus.merge.varying import numbers
from mergekit_plus.search.objective import nll, spread
from mergekit_plus.search.run import search
from mergekit_plus.search.space import SearchOptions, parse_axes
from mergekit_plus.steps import Execution, MergeStep

WINDOW, TEST_WINDOWS, SEARCH_WINDOWS = 256, 16, 3
# what is searched where it is not the scale and every share that has a range
SPACES = {
    "linear": "weight:each",
    "multislerp": "weight:each",
    "task_arithmetic": "lambda",  # its density does nothing
    "breadcrumbs": "lambda,density,gamma=0..0.2",
    "breadcrumbs_ties": "lambda,density,gamma=0..0.2",
    "consensus": "lambda,mask_lambda=0..1",
    "ram": "epsilon=0..0.001",
    "ramplus_tl": "r=0..2,alpha=0..1",
}


def space(name: str) -> str:
    """What is searched of a method; empty where there is nothing."""
    table = METHODS[name].options.table.values()
    return SPACES.get(name) or ",".join(option.name for option in table if option.number and option.search and option.name not in ("weight", "max_iter"))


class Bench:
    """The models, the texts, and the results so far."""

    def __init__(self, models: Path, texts: Path, cache: Path, budget: int, test_windows: int) -> None:
        self.names = sorted(path.name for path in models.iterdir() if (path / "config.json").is_file() and (texts / f"{path.name}.test.txt").is_file())
        self.inputs = {name: Checkpoint.open(models / name) for name in ("base", *self.names)}
        self.texts, self.cache, self.budget = texts, cache, budget
        self.done: dict[str, Any] = dict(json.loads(line) for line in cache.read_text().splitlines()) if cache.is_file() else {}
        tokenizer = load_tokenizer(self.inputs["base"])
        model = load_model(self.inputs["base"])
        self.rows = {name: spread(model, tokenize(tokenizer, (texts / f"{name}.test.txt").read_text()), WINDOW, test_windows) for name in self.names}

    def losses(self, checkpoint: Checkpoint) -> dict[str, float]:
        """On the test texts, nats a token."""
        model = load_model(checkpoint)
        return {name: nll(model, rows) for name, rows in self.rows.items()}

    def remember(self, key: str, make: Any) -> Any:
        """What the cache holds, or what is made now."""
        if key not in self.done:
            start = time.monotonic()
            self.done[key] = make()
            with self.cache.open("a") as file:
                print(json.dumps([key, self.done[key]]), file=file)
            print(f"{key}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        return self.done[key]

    def step(self, method: str, axes: str = "") -> MergeStep:
        texts = {name: str(self.texts / f"{name}.val.txt") for name in self.names}
        wanted = SearchOptions(options=parse_axes(axes), texts=texts, budget=self.budget, window=WINDOW, windows=SEARCH_WINDOWS) if axes else None
        return MergeStep(method=method, models=self.names, base="base", search=wanted)

    def merged(self, step: MergeStep) -> dict[str, float]:
        return self.losses(step.build(self.inputs, None, Execution()))

    def searched(self, method: str, axes: str) -> dict[str, Any]:
        """The losses at the values that a search finds, the values, and what they cost."""
        found = search(self.step(method, axes), self.inputs, Path(), Execution())
        assert found.searched is not None
        return {"losses": self.merged(found), "options": found.searched["found"], "evaluations": len(found.searched["evaluations"])}

    def normalised(self, losses: Mapping[str, float]) -> tuple[float, float]:
        """Mean and worst over the texts."""
        base = self.remember("base", lambda: self.losses(self.inputs["base"]))
        shares = []
        for name in self.names:
            own = self.remember(f"expert {name}", lambda name=name: self.losses(self.inputs[name]))[name]
            shares.append((base[name] - losses[name]) / (base[name] - own))
        return math.fsum(shares) / len(shares), min(shares)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("merge-quality.jsonl"))
    parser.add_argument("--budget", type=int, default=24, help="models that each search measures")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--axes", nargs="*", help="what is searched instead, a row each: lambda lambda:depth3 lambda:kinds")
    parser.add_argument("--test-windows", type=int, default=TEST_WINDOWS, help="of each test text; a cache holds results of one number")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(options.models, options.texts, options.cache, options.budget, options.test_windows)
    rows = []
    for name in options.methods or METHODS:
        least, most = METHODS[name].models
        if len(bench.names) < least or (most is not None and len(bench.names) > most):
            continue
        plain = bench.normalised(bench.remember(name, lambda name=name: bench.merged(bench.step(name))))
        for axes in options.axes or [space(name)]:
            row = [name, *(f"{share:.3f}" for share in plain)]
            if axes:
                key = f"{name} {axes} {bench.budget}x{SEARCH_WINDOWS}"
                found = bench.remember(key, lambda name=name, axes=axes: bench.searched(name, axes))
                best = bench.normalised(found["losses"])
                row += [f"{best[0]:.3f}", f"{best[1]:.3f}", shown(found["options"])]
            else:
                best = plain
                row += ["-", "-", "nothing to search"]
            rows.append((best[0], row))
    print("| method | mean | worst | mean, searched | worst, searched | found |\n|---|---|---|---|---|---|")
    for _, row in sorted(rows, key=lambda pair: -pair[0]):
        print(f"| {' | '.join(row)} |")


def shown(options: Mapping[str, Any]) -> str:
    """Option values as a table has them."""
    return ", ".join(f"{name} {' '.join(f'{number:.3g}' for number in numbers(value))}" for name, value in options.items())


if __name__ == "__main__":
    main()
