"""What folding saves in time and memory: `python benchmarks/fold_speed.py [MODEL]`, beside taking out neurons and heads.

For each variant of the model (float32, one thread): CPU time of a pass over 256 tokens, and of one more token with the cache of those; bytes of that cache;
bytes of weights that lie in memory. Variants are taken in turns; a ratio is the median, over the rounds, of what a variant took by what the model took in the
same round. Nothing is written but temporary files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TOKENS, STEPS = 256, 16  # of the pass; of decoding, one at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "tests/models/base"))
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    models = variants(given.model)
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    took: dict[str, dict[str, list[float]]] = {name: {"pass": [], "token": []} for name in models}
    caches: dict[str, int] = {}
    with torch.inference_mode():
        for number in range(given.rounds + 1):
            for name, model in models.items():
                seconds, cache = cpu_seconds(lambda model=model: model(ids, use_cache=True).past_key_values)
                caches[name] = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
                decoding, _ = cpu_seconds(lambda model=model, cache=cache: [model(ids[:, :1], past_key_values=cache) for _ in range(STEPS)])
                if number:  # the first round warms up
                    took[name]["pass"].append(seconds)
                    took[name]["token"].append(decoding / STEPS)
    whole = next(iter(models))
    print(f"| | weights in memory | {TOKENS} tokens, ms | ratio | one token, ms | ratio | KV cache |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, model in models.items():
        held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
        cells = [f"{sum(held.values()) / 1e6:.1f} MB"]
        for kind, seconds in took[name].items():
            ratio = statistics.median(own / dense for own, dense in zip(seconds, took[whole][kind], strict=True))
            cells += [f"{statistics.median(seconds) * 1e3:.2f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {caches[name] / 1e3:.0f} kB |", flush=True)


def variants(name: str) -> dict[str, Any]:
    """The model and what becomes of it, in memory."""
    from transformers import AutoModelForCausalLM

    from mergekit_plus.checkpoint import Checkpoint, save
    from mergekit_plus.evaluate import load_model
    from prune.fold import Fold, compacted, folded, mapped, stack_of
    from prune.structured import shrink

    model = Checkpoint.open(name)
    blocks = len(stack_of(model).layers)
    found = {"the model": load_model(model)}
    for removed in range(1, min(4, blocks - 1) + 1):
        kept = [block for block in range(blocks) if not 1 <= block <= removed]  # which ones does not matter here
        found[f"{removed} of {blocks} blocks removed"] = load_model(folded(model, Fold.of(kept)))
    for share in (2, 3):
        fold = mapped(range(blocks), share)
        found[f"groups of {share}, expanded"] = load_model(folded(model, fold))
        with tempfile.TemporaryDirectory() as folder:
            save(compacted(model, fold), Path(folder) / "compact")
            found[f"groups of {share}, compact"] = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "compact", trust_remote_code=True, dtype=torch.float32
            ).eval()  # fmt: skip
    for shares in ({"mlp": 0.25}, {"mlp": 0.5}, {"heads": 0.5}, {"mlp": 0.5, "heads": 0.5}):
        found["--structured " + ",".join(f"{kind}={share:g}" for kind, share in shares.items())] = load_model(shrink(model, shares))
    return found


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """What this process computed for it: others on the machine count little."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
