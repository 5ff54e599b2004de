"""One against two Ray workers, and one against two threads of one process, on Llama-shaped bf16 checkpoints: the seconds of a save, and what they go to.

    python benchmarks/scale.py --work /tmp/bench --runs 3

Each row is a run in a process of its own, the ways in turn, several times; the median is printed as it comes. "Whole" is from before the imports to the end.
"Writing" is the phase in which the tensors are computed, hashed and written; "first" is how long it took of that until the first batch was there
(for Ray: processes started, torch imported, the plan made again), and "steady" the rest of the bytes over the rest of the seconds. The files are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge import SHAPES, make, shards  # the benchmark beside this one

WAYS = {"1 thread": ("threads", 1), "2 threads": ("threads", 2), "1 Ray worker": ("ray", 1), "2 Ray workers": ("ray", 2)}
JOBS: dict[str, dict[str, Any]] = {
    "linear": {"inputs": ["a", "b"], "step": {"merge": {"models": ["a", "b"], "weight": [0.6, 0.4]}}},
    "ties": {"inputs": ["base", "a", "b"], "step": {"merge": {"method": "ties", "base": "base", "models": ["a", "b"], "density": 0.5}}},
    "pcb": {"inputs": ["base", "a", "b"], "step": {"merge": {"method": "pcb", "base": "base", "models": ["a", "b"], "lambda": 0.5}}},
    "quantize": {"inputs": ["a"], "step": {"quantize": {"bits": 4}}},
}


class Clock:
    """Progress that notes how long each phase took, and when the first of its bytes were done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        self.label, self.start = label, time.perf_counter()
        yield
        self.seconds[label] = time.perf_counter() - self.start

    def advance(self, amount: int) -> None:
        self.done[self.label] = self.done.get(self.label, 0) + amount
        self.first.setdefault(self.label, (time.perf_counter() - self.start, amount))

    def say(self, text: str) -> None:
        pass

    def tell(self, line: str) -> None:
        pass


def child(job: str, way: str, models: Path, out: Path, began: float) -> dict[str, float]:
    """Carry out a job one way, in this process."""
    from mergekit_plus.checkpoint import SaveOptions
    from mergekit_plus.recipe import check, run
    from mergekit_plus.steps import Execution

    engine, workers = WAYS[way]
    clock = Clock()
    recipe = check({"inputs": {name: str(models / name) for name in JOBS[job]["inputs"]}, "steps": [JOBS[job]["step"]]}, Path(), job)
    run(recipe, Execution(SaveOptions(overwrite=True, workers=workers, memory=1 << 30, max_shard_size=300 * 10**6, progress=clock), out=out, engine=engine))
    first, amount = clock.first["writing"]
    steady = (clock.done["writing"] - amount) / max(1e-9, clock.seconds["writing"] - first) / 1e6
    measuring = sum(seconds for label, seconds in clock.seconds.items() if "measuring" in label)
    return {"whole": time.time() - began, "measuring": measuring, "writing": clock.seconds["writing"], "first": first, "steady": steady}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs, about 4 GB")
    parser.add_argument("--shape", choices=SHAPES, default="500M")
    parser.add_argument("--jobs", default="linear,ties,quantize")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("JOB", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    models, out = options.work / options.shape, options.work / "scale-out"
    if options.child:
        print(json.dumps(child(*options.child, models, out, float(os.environ["BEGAN"]))))
        return
    base = models / "base"
    for seed, (name, origin) in enumerate([("base", None), ("a", base), ("b", base)]):
        if not (models / name).exists():
            make(models / name, options.shape, seed, origin)
    print(f"{options.shape}, {sum(path.stat().st_size for path in shards(base)) / 1e9:.2f} GB a model, {len(os.sched_getaffinity(0))} cores, "
          f"median of {options.runs}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print("| job | way | whole s | measuring s | writing s | of it first s | steady MB/s | steady / one |\n|---|---|---|---|---|---|---|---|")
    for job in options.jobs.split(","):
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        digests: set[str] = set()
        for _ in range(options.runs):
            for way in WAYS:
                environment = {**os.environ, "BEGAN": str(time.time()), "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, __file__, "--work", str(options.work), "--shape", options.shape, "--child", job, way]
                rows[way].append(json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout))
                digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in shards(out))).hexdigest())
                shutil.rmtree(out)
        assert len(digests) == 1, "the ways differ"
        median = {way: {key: statistics.median(row[key] for row in found) for key in found[0]} for way, found in rows.items()}
        for way, row in median.items():
            one = median[way.replace("2", "1").replace("threads", "thread").replace("workers", "worker")]
            times = f"{row['steady'] / one['steady']:.2f}" if row is not one else ""
            facts = " | ".join(f"{row[key]:.1f}" for key in ("whole", "measuring", "writing", "first"))
            print(f"| {job} | {way} | {facts} | {row['steady']:.0f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
