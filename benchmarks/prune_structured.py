"""What taking out neurons and heads saves and costs: `python benchmarks/prune_structured.py MODEL --calibration TRAIN.txt --test TEST.txt`.

For a few shares: parameters, time of a forward pass over 256 tokens (float32, the least of many, models taken in turns), and perplexity over the first 40
windows of 256 tokens of the test text, without a calibration text and with 16 windows of one. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARES = [{}, {"mlp": 0.25}, {"mlp": 0.5}, {"heads": 0.5}, {"mlp": 0.5, "heads": 0.5}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from mergekit_plus.calibration import read_text
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
    from prune.calibrated import shrink_on
    from prune.structured import shrink

    torch.set_num_threads(1)
    model = Checkpoint.open(given.model)
    tokenizer = load_tokenizer(model)
    test = tokenize(tokenizer, Path(given.test).read_text())
    ids = read_text([Path(given.calibration)], tokenizer, 16, 256, 0)
    by_norm = [load_model(shrink(model, shares) if shares else model) for shares in SHARES]
    best = [float("inf")] * len(SHARES)
    with torch.inference_mode():
        for _ in range(20):
            for number, loaded in enumerate(by_norm):
                start = time.perf_counter()
                loaded(test[:256][None])
                best[number] = min(best[number], time.perf_counter() - start)
    print("| taken out | parameters | forward, ms | perplexity, by norm | on a text |\n|---|---:|---:|---:|---:|")
    for shares, loaded, seconds in zip(SHARES, by_norm, best, strict=True):
        name = ", ".join(f"{kind} {share:g}" for kind, share in shares.items()) or "nothing"
        cells = [f"{sum(parameter.numel() for parameter in loaded.parameters()) / 1e6:.2f} M", f"{seconds * 1e3:.1f}"]
        cells.append(f"{perplexity(loaded, test, window=256, limit=40).value:.1f}")
        cells.append(f"{perplexity(load_model(shrink_on(model, ids, shares)), test, window=256, limit=40).value:.1f}" if shares else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
