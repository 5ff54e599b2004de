"""Perplexity of a model pruned in every way: `python benchmarks/prune_quality.py MODEL --calibration TRAIN.txt --test TEST.txt`.

Each method prunes the linear layers of the blocks to 50, 60 and 70 % of zeros and to 2:4 and 4:8. Those that look at a text see `--windows` windows of
it, drawn three times (`--seeds`), and so is the random mask; the table gives the mean, and half of the spread where there is one. Perplexity is over the
first `--windows` windows of 256 tokens of the test text, in float32. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES = ["0.5", "0.6", "0.7", "2:4", "4:8"]
DATA_FREE = {"random": ("random", "tensor"), "magnitude, row": ("magnitude", "row"), "magnitude, tensor": ("magnitude", "tensor"),
             "magnitude, block": ("magnitude", "block"), "magnitude, global": ("magnitude", "global")}  # fmt: skip
CALIBRATED = {"wanda, row": ("wanda", "row"), "wanda, tensor": ("wanda", "tensor"), "sparsegpt": ("sparsegpt", None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text for the methods that look at inputs")
    parser.add_argument("--test", required=True, help="text on which perplexity is measured")
    parser.add_argument("--windows", type=int, default=40, help="windows of 256 tokens of the calibration text, and of the test text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", help="rows of the table to measure; may be repeated (default: all)")
    parser.add_argument("--sparsities", nargs="+", default=SPARSITIES, help="columns of the table")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from mergekit_plus.calibration import read_text
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
    from prune import Sparsity
    from prune.calibrated import prune_on
    from prune.plan import PruneOptions, prune

    model = Checkpoint.open(given.model)
    tokenizer = load_tokenizer(model)
    test = tokenize(tokenizer, Path(given.test).read_text())
    texts = [read_text([Path(given.calibration)], tokenizer, given.windows, 256, seed) for seed in range(given.seeds)]

    def measured(made: Checkpoint) -> float:
        loaded = load_model(made)
        return perplexity(loaded, test, window=256, limit=given.windows).value

    def of(method: str, scope: str | None, sparsity: Sparsity) -> Iterator[Callable[[], Checkpoint]]:
        within = None if sparsity.group else scope
        if method in ("wanda", "sparsegpt"):
            yield from (lambda ids=ids: prune_on(model, ids, sparsity, method, within) for ids in texts)  # type: ignore[misc]
        else:
            seeds = range(given.seeds if method == "random" else 1)
            yield from (lambda seed=seed: prune(model, sparsity, method, within, how=PruneOptions(seed=seed)) for seed in seeds)  # type: ignore[misc]

    print(f"dense: {measured(model):.2f}")
    print("| method | " + " | ".join(given.sparsities) + " |\n|---|" + "---:|" * len(given.sparsities))
    for name, (method, scope) in {**DATA_FREE, **CALIBRATED}.items():
        if given.only and name not in given.only:
            continue
        cells = []
        start = time.monotonic()
        for asked in given.sparsities:
            if ":" in asked and scope not in ("tensor", None) and name != "wanda, row":
                cells.append("")  # a pattern is compared within its groups, whatever the scope
                continue
            sparsity = Sparsity.of(pattern=asked) if ":" in asked else Sparsity.of(float(asked))
            found = [measured(make()) for make in of(method, scope, sparsity)]
            cells.append(f"{mean(found):.1f}" + (f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else ""))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
