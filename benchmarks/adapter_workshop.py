"""What the workshop's ways to make adapters are worth: the tables of docs/adapters.md, "Workshop".

    python benchmarks/adapter_workshop.py --models MODELS --texts TEXTS --cache results.jsonl

MODELS holds `base` and fine-tunes of it; TEXTS a `<domain>.train.txt` and a `<domain>.test.txt` of each, a `general.train.txt`, and a `wiki.test.txt`, which
nothing is trained on. Losses are in nats on 16 windows of 256 tokens, spread evenly over a test text. What is trained is trained on the training text for
STEPS steps of 4 windows of 128 tokens. Each result goes into the cache at once, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mergekit_plus.adapters.extract import ExtractOptions, extract
from mergekit_plus.calibration import read_text
from mergekit_plus.calibration.statistics import MomentsFile, calibrate
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.model import describe
from mergekit_plus.progress import on
from mergekit_plus.training import TrainOptions, loss_on
from quant.adapters.neurons import NeuronOptions, train_neurons
from quant.adapters.pools import Sharing
from quant.adapters.principal import Init
from quant.adapters.ranks import ranks_within
from quant.adapters.scratch import LR, TrainAdapterOptions, train_adapter
from quant.adapters.train import Lesson

WINDOW, WINDOWS, CALIBRATION = 256, 16, 128
BATCH, TRAIN_WINDOW = 4, 128

Ranks = Callable[[Mapping[str, Tensor], int, int], dict[str, int]]


class Bench:
    """The models, the texts, and the results so far."""

    def __init__(self, models: Path, texts: Path, cache: Path, steps: int) -> None:
        self.models, self.texts, self.cache, self.steps = models, texts, cache, steps
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
        with tempfile.TemporaryDirectory() as folder:
            for rank in (4, 16, 64):
                for heard in (False, True):
                    make = lambda out, rank=rank, heard=heard: self.extract(domain, tuned, rank, heard, out, Path(folder))  # noqa: E731
                    row = self.measured(f"extract {domain} {rank} {heard}", make)
                    share = (start - row["loss"]) / (start - end)
                    errors = f"{row['weights']:.3f} | {row['outputs']:.3f}"
                    print(f"| {rank} | {'yes' if heard else 'no'} | {errors} | {row['loss']:.4f} | {share:.1%} |", flush=True)

    def moments(self, tuned: Checkpoint, domain: str, part: str, windows: int, folder: Path) -> Checkpoint:
        """The moments of a fine-tune on a text, measured once."""
        path = folder / f"{domain}.{part}.safetensors"
        if not path.exists():
            save(calibrate(tuned, self.text(domain, part, windows), {}), path)
        return Checkpoint.open(path)

    def extract(self, domain: str, tuned: Checkpoint, rank: int, heard: bool, out: Path, folder: Path) -> dict[str, float]:
        """An adapter's errors relative to the change, of weights and of outputs on the test text, and its loss."""
        given = self.moments(tuned, domain, "train", CALIBRATION, folder) if heard else None
        save(extract(self.base, tuned, ExtractOptions(rank), moments=given), out / "adapter")
        adapted = Checkpoint.open(f"{self.models / 'base'}+{out / 'adapter'}")
        test = MomentsFile(self.moments(tuned, domain, "test", WINDOWS, folder))
        sums = torch.zeros(4, dtype=torch.float64)
        for name in (name for name, meaning in describe(tuned).tensors.items() if meaning.role == "linear" and name in test):
            gram = test.checkpoint.read(test.reads(name)[0][1]).double()
            whole = tuned.read(name).double()
            for place, change in enumerate((whole - self.base.read(name).double(), whole - adapted.read(name).double())):
                sums[place] += change.square().sum()
                sums[2 + place] += ((change @ gram) * change).sum()
        return {"weights": float((sums[1] / sums[0]).sqrt()), "outputs": float((sums[3] / sums[2]).sqrt()), "loss": self.losses(adapted, domain)[domain]}

    def trained(
        self, domain: str, key: str, options: TrainAdapterOptions | NeuronOptions, lr: float = LR, text: str = "", ranks: Ranks = ranks_within
    ) -> Mapping[str, Any]:
        """The losses of a trained adapter on its domain and on what nothing is trained on, and how many numbers and bytes it has."""

        def make(out: Path) -> Mapping[str, Any]:
            training = TrainOptions(self.steps, lr, BATCH, schedule="cosine", warmup=0.05, clip=None, evaluations=2)
            lesson = Lesson(self.text(domain, "train", self.steps * BATCH + 16, TRAIN_WINDOW), training)
            moments = calibrate(self.base, self.text(text, "train", CALIBRATION), {}) if text else None
            if isinstance(options, NeuronOptions):
                made = train_neurons(self.base, lesson, options)
            else:
                with patch("quant.adapters.scratch.ranks_within", ranks):
                    made = train_adapter(self.base, lesson, options, moments)
            save(made, out / "adapter")
            numbers = sum(spec.numel for spec in Checkpoint.open(out / "adapter").specs.values())
            size = sum(path.stat().st_size for path in (out / "adapter").iterdir() if path.suffix == ".safetensors")
            losses = self.losses(f"{self.models / 'base'}+{out / 'adapter'}", domain, "wiki")
            return {**losses, "numbers": numbers, "bytes": size, "notes": made.notes}

        return self.measured(f"{domain} {self.steps} {key}", make)

    def started(self, domain: str) -> None:
        """Adapters that start from components of the weights."""
        print(f"\nrank 8 on `{domain}`, {self.steps} steps\n\n| start | rate | text | loss | wiki |\n|---|---:|---|---:|---:|")
        ways: list[tuple[Init, float, str]] = [("lora", 1e-3, ""), ("lora", LR, ""), ("pissa", 1e-2, ""), ("corda-ipm", 1e-2, domain)]
        ways += [("corda-kpm", 1e-2, "general"), ("corda-kpm", 1e-1, "general"), ("pissa", 3e-2, "")]
        for init, lr, text in ways:
            row = self.trained(domain, f"{init} {lr}", TrainAdapterOptions(16, 8, init=init), lr, text)
            print(f"| `{init}` | {lr:g} | {text or 'none'} | {row[domain]:.4f} | {row['wiki']:.4f} |", flush=True)

    def shared(self, domain: str) -> None:
        """Adapters out of pools, against LoRA of as many parameters, and of as much rank."""
        print(f"\npools on `{domain}`, {self.steps} steps\n\n| | rank | parameters | loss |\n|---|---:|---:|---:|")
        each = self.trained(domain, "rank 2", TrainAdapterOptions(16, 2))["numbers"] // 2
        for rank in (2, 16):
            row = self.trained(domain, f"rank {rank}", TrainAdapterOptions(16, rank))
            print(f"| LoRA | {rank} | {each * rank} | {row[domain]:.4f} |", flush=True)
        row = self.trained(domain, "pools", TrainAdapterOptions(16, 16, sharing=Sharing(2)))
        print(f"| pools of rank 2 | 16 | {each * 2} | {row[domain]:.4f} |", flush=True)

    def widened(self, domain: str) -> None:
        """Neurons beside those of every MLP, against LoRA of about as many numbers."""
        print(f"\nneurons on `{domain}`, {self.steps} steps\n\n| | bits | numbers | bytes | loss | wiki |\n|---|---:|---:|---:|---:|---:|")
        for bits, lr in ((16, LR), (1, 1e-2)):
            lora, neurons = TrainAdapterOptions(bits, 8), NeuronOptions(50, bits)
            for name, row in (
                ("LoRA, rank 8", self.trained(domain, f"lora {lr}" if bits == 16 else "lora 1 bit", lora, lr)),
                ("50 neurons", self.trained(domain, f"neurons {bits}", neurons, lr)),
            ):
                print(f"| {name} | {bits} | {row['numbers']} | {row['bytes']} | {row[domain]:.4f} | {row['wiki']:.4f} |", flush=True)

    def budgeted(self, domain: str) -> None:
        """Ranks within the parameters of rank 4 everywhere: all alike, by sensitivity, and by its inverse."""
        print(f"\nthe parameters of rank 4, on `{domain}`, {self.steps} steps\n\n| ranks | parameters | loss |\n|---|---:|---:|")
        uniform = self.trained(domain, "rank 4", TrainAdapterOptions(16, 4))
        print(f"| 4 everywhere | {uniform['numbers']} | {uniform[domain]:.4f} |", flush=True)
        for name, ranks in {"by sensitivity": ranks_within, "inverted": inverted}.items():
            row = self.trained(domain, f"ranks {name}", TrainAdapterOptions(16, 16, budget=uniform["numbers"]), ranks=ranks)
            print(f"| {name}, up to 16 | {row['numbers']} | {row[domain]:.4f} |  {row['notes'][0]}", flush=True)


def inverted(sensitivity: Mapping[str, Tensor], budget: int, most: int) -> dict[str, int]:
    """The ranks that modules would get were their mean sensitivity its own inverse."""
    return ranks_within({name: own / own.mean().square() for name, own in sensitivity.items()}, budget, most)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="of every training")
    parser.add_argument("--tables", default="extract,start,pools,budget,neurons", help="which of the tables")
    parser.add_argument("--domains", default="code,drama", help="of the fine-tunes")
    options = parser.parse_args()
    on()
    bench = Bench(options.models, options.texts, options.cache, options.steps)
    for table in options.tables.split(","):
        for domain in options.domains.split(","):
            {"extract": bench.extracted, "start": bench.started, "pools": bench.shared, "budget": bench.budgeted, "neurons": bench.widened}[table](domain)


if __name__ == "__main__":
    main()
