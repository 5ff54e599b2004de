"""What the workshop's ways to make adapters are worth: the tables of docs/adapters.md, "Workshop".

    python benchmarks/adapter_workshop.py --models MODELS --texts TEXTS --cache results.jsonl [--tables extract]

MODELS holds `base` and fine-tunes of it; TEXTS a `<domain>.train.txt` and a `<domain>.test.txt` of each. Losses are in nats on 16 windows of 256 tokens,
spread evenly over the test text. Each result goes into the cache at once, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.adapters.extract import ExtractOptions, extract
from mergekit_plus.calibration import read_text
from mergekit_plus.calibration.statistics import MomentsFile, calibrate
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.model import describe
from mergekit_plus.progress import on
from mergekit_plus.training import loss_on

WINDOW, WINDOWS, CALIBRATION = 256, 16, 128


class Bench:
    """The models, the texts, and the results so far."""

    def __init__(self, models: Path, texts: Path, cache: Path) -> None:
        self.models, self.texts, self.cache = models, texts, cache
        self.base = Checkpoint.open(models / "base")
        self.tokenizer = load_tokenizer(self.base)
        self.rows: dict[str, Any] = {
            row["key"]: row for line in (cache.read_text().splitlines() if cache.exists() else ()) for row in [json.loads(line)]
        }

    def text(self, name: str, part: str, windows: int, window: int = WINDOW) -> Tensor:
        """Windows of a text, int64 [windows, window]."""
        return read_text([self.texts / f"{name}.{part}.txt"], self.tokenizer, windows, window)

    def measured(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
        """A row of results: what `make` returns, which may write into the folder that it is given."""
        if key not in self.rows:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                self.rows[key] = {"key": key, **make(Path(folder)), "seconds": round(time.monotonic() - started)}
            with self.cache.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    def losses(self, ref: Checkpoint | str, *texts: str) -> dict[str, float]:
        """The loss of a model on the test texts of domains."""
        model = load_model(Checkpoint.open(ref) if isinstance(ref, str) else ref)
        return {name: loss_on(model, self.text(name, "test", WINDOWS), batch=4) for name in texts}

    def extracted(self, domain: str) -> None:
        """Adapters out of a fine-tune, by the plain SVD and by the one that a text weighs."""
        tuned = Checkpoint.open(self.models / domain)
        start, end = (self.measured(f"{part.label} {domain}", lambda out, part=part: self.losses(part, domain))[domain] for part in (self.base, tuned))
        print(f"\n`{domain}`: loss {start:.4f} of the base, {end:.4f} of the fine-tune\n")
        print("| rank | text | weights | outputs | loss | of the gain |\n|---:|---|---:|---:|---:|---:|")
        for rank in (4, 16, 64):
            for text in ("", domain, "general"):
                row = self.measured(f"extract {domain} {rank} {text}", lambda out, rank=rank, text=text: self.extract(domain, tuned, rank, text, out))
                share = (start - row["loss"]) / (start - end)
                print(f"| {rank} | {text or 'none'} | {row['weights']:.3f} | {row['outputs']:.3f} | {row['loss']:.4f} | {share:.1%} |", flush=True)

    def extract(self, domain: str, tuned: Checkpoint, rank: int, text: str, out: Path) -> dict[str, float]:
        """An adapter's errors relative to the change, of weights and of outputs on the test text, and its loss."""
        moments = calibrate(tuned, self.text(text, "train", CALIBRATION), {}) if text else None
        save(extract(self.base, tuned, ExtractOptions(rank), moments=moments), out / "adapter")
        save(calibrate(tuned, self.text(domain, "test", WINDOWS), {}), out / "moments.safetensors")
        adapted = Checkpoint.open(f"{self.models / 'base'}+{out / 'adapter'}")
        test = MomentsFile(Checkpoint.open(out / "moments.safetensors"))
        sums = torch.zeros(4, dtype=torch.float64)
        for name in (name for name, meaning in describe(tuned).tensors.items() if meaning.role == "linear" and name in test):
            gram = test.checkpoint.read(test.reads(name)[0][1]).double()
            whole = tuned.read(name).double()
            for place, change in enumerate((whole - self.base.read(name).double(), whole - adapted.read(name).double())):
                sums[place] += change.square().sum()
                sums[2 + place] += ((change @ gram) * change).sum()
        return {"weights": float((sums[1] / sums[0]).sqrt()), "outputs": float((sums[3] / sums[2]).sqrt()), "loss": self.losses(adapted, domain)[domain]}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--tables", default="extract", help="which of the tables")
    parser.add_argument("--domains", default="code,drama", help="of the fine-tunes")
    options = parser.parse_args()
    on()
    bench = Bench(options.models, options.texts, options.cache)
    for table in options.tables.split(","):
        for domain in options.domains.split(","):
            {"extract": bench.extracted}[table](domain)


if __name__ == "__main__":
    main()
