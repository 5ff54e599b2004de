"""What adapters and fine-tunes keep at a few bits: the tables in docs/adapters.md.

    python benchmarks/adapter_bits.py --models MODELS --texts TEXTS --cache results.jsonl

MODELS holds `base`, fine-tunes of it, and LoRA adapters `lora-<domain>`; TEXTS a `<domain>.train.txt` and a `<domain>.test.txt` of each. Losses are in
nats on 16 windows of 256 tokens, spread evenly over the test text; "of the gain" is the share of what the adapter (or the fine-tune) takes off
the base's loss. Bytes are those of every file that has to be kept: tensors, adapter_config.json, and the sidecar. What is trained is trained on
the training text, for STEPS steps of BATCH windows of 128 tokens in bfloat16 where torch finds it safe (the scales of differences: 40 of 4, in float32), at one
learning rate for each kind, or two, and the state is kept that is best on 16 windows of the training text that are held out. Each result goes into the cache at
once, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_plus.adapters import open_adapter
from mergekit_plus.calibration import read_text
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_QUANT, DELTA_QUANT
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.progress import on
from mergekit_plus.training import TrainOptions, loss_on
from quant.adapters.delta import DeltaOptions, delta
from quant.adapters.plan import QuantizeOptions, quantize_adapter
from quant.adapters.scratch import TrainAdapterOptions, train_adapter
from quant.adapters.train import Lesson

WINDOW, WINDOWS, TRAIN_WINDOW = 256, 16, 128
DISTILL_LR = 0.03
KEPT = (ADAPTER_CONFIG, ADAPTER_QUANT, DELTA_QUANT)


class Bench:
    """The models, the texts, and the results so far."""

    def __init__(self, models: Path, texts: Path, cache: Path, steps: int, batch: int) -> None:
        self.models, self.texts, self.cache, self.steps, self.batch = models, texts, cache, steps, batch
        self.base = Checkpoint.open(models / "base")
        self.tokenizer = load_tokenizer(self.base)
        self.rows = {row["key"]: row for line in (cache.read_text().splitlines() if cache.exists() else ()) for row in [json.loads(line)]}

    def lesson(self, domain: str, lr: float, steps: int, batch: int, autocast: bool = True) -> Lesson:
        """Windows of the training text of a domain, and how to train on them."""
        rows = read_text([self.texts / f"{domain}.train.txt"], self.tokenizer, steps * batch + 16, TRAIN_WINDOW)
        return Lesson(rows, TrainOptions(steps, lr, batch, schedule="cosine", warmup=0.05, clip=None, evaluations=4 if autocast else 2, autocast=autocast))

    def measured(self, domain: str, name: str, make: Callable[[Path], str], file_bytes: Callable[[Path], int] | None = None) -> dict[str, Any]:
        """A row: the loss of the model whose reference `make` returns, and the bytes of what it wrote into the folder that it is given."""
        key = f"{domain} {name}"
        if key not in self.rows:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                model = load_model(Checkpoint.open(make(out)))
                loss = loss_on(model, read_text([self.texts / f"{domain}.test.txt"], self.tokenizer, WINDOWS, WINDOW), batch=4)
                size = (file_bytes or kept_bytes)(out) if out.exists() or file_bytes else 0
            self.rows[key] = {"key": key, "loss": loss, "bytes": size, "seconds": round(time.monotonic() - started)}
            with self.cache.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    @property
    def told(self) -> str:
        """How long it trains."""
        return f"{self.steps} steps of {self.batch}"

    def adapters(self, domain: str, tables: str) -> None:
        """The table of one adapter."""
        base, lora = self.models / "base", self.models / f"lora-{domain}"
        adapter = open_adapter(lora)
        half = sum(spec.numel * 2 for spec in adapter.checkpoint.specs.values()) + (lora / ADAPTER_CONFIG).stat().st_size
        start = self.measured(domain, "base", lambda out: str(base))["loss"]
        whole = self.measured(domain, "LoRA, rank 16, fp16", lambda out: f"{base}+{lora}", lambda out: half)

        def line(name: str, row: dict[str, Any]) -> None:
            share = (start - row["loss"]) / (start - whole["loss"])
            print(f"| {name} | {row['bytes'] / 1e3:.0f} kB | {row['bytes'] / half:.3f} | {row['loss']:.4f} | {share:.1%} |", flush=True)

        print(f"\n`lora-{domain}`: base {start:.4f}\n\n| | bytes | of fp16 | loss | of the gain |\n|---|---:|---:|---:|---:|")
        line("LoRA, rank 16, fp16", whole)
        ways = {
            "plain, a scale for each tensor": QuantizeOptions(scale="tensor", gauge="none", refit=False),
            "plain": QuantizeOptions(gauge="none", refit=False),
            "gauge `svd`": QuantizeOptions(gauge="svd", refit=False),
            "gauge `balanced`": QuantizeOptions(refit=False),
            "gauge `balanced`, refit": QuantizeOptions(),
        }
        for bits in (8, 4, 3, 2, 1) if "adapters" in tables else ():
            for way, options in ways.items():
                if bits > 2 and way != "plain":
                    continue
                own = replace(options, bits=bits)
                line(f"{bits} bits, {way}", self.measured(domain, f"{bits} {way}", lambda out, own=own: self.quantized(base, adapter, own, None, out)))
        for average in (2, 1.5, 1.25, 1, 0.5) if "adapters" in tables else ():
            own = QuantizeOptions(average_bits=average)
            made = lambda out, own=own: self.quantized(base, adapter, own, None, out)  # noqa: E731
            line(f"{average:g} bits on the average", self.measured(domain, f"mixed {average:g}", made))
        trained = {
            "1 bit, distilled": QuantizeOptions(1),
            "1 bit, for the text": QuantizeOptions(1, distill=0),
            "1.2 bits on the average, for the text": QuantizeOptions(average_bits=1.2, distill=0),
        }
        for name, own in trained.items() if "distilled" in tables else ():
            lesson = partial(self.lesson, domain, DISTILL_LR, self.steps, self.batch)
            made = lambda out, own=own, lesson=lesson: self.quantized(base, adapter, own, lesson(), out)  # noqa: E731
            line(f"{name}, {self.told}", self.measured(domain, f"{name}, {self.told}", made))

    def scratch(self, domain: str) -> None:
        """Adapters that are trained from scratch on the same lesson: rank against precision at equal bytes."""
        base = self.models / "base"
        start = self.measured(domain, "base", lambda out: str(base))["loss"]
        print(f"\ntrained from scratch on {domain}, {self.told}: base {start:.4f}\n\n| | bytes | loss | less than the base |\n|---|---:|---:|---:|")
        ways = {
            "rank 16, 16 bits": (TrainAdapterOptions(16, 16), 3e-3),
            "rank 16, 16 bits, rate 0.01": (TrainAdapterOptions(16, 16), 1e-2),
            "rank 1, 16 bits": (TrainAdapterOptions(16, 1), 1e-2),
            "rank 16, 1 bit, rate 0.003": (TrainAdapterOptions(1, 16), 3e-3),
            "rank 16, 1 bit": (TrainAdapterOptions(1, 16), 1e-2),
            "rank 16, 1 bit, k-median, a scale for each tensor, rate 0.003": (TrainAdapterOptions(1, 16, "k-median", "tensor"), 3e-3),
            "rank 16, 1 bit, k-median, a scale for each tensor": (TrainAdapterOptions(1, 16, "k-median", "tensor"), 1e-2),
        }
        for name, (options, lr) in ways.items():
            made = lambda out, options=options, lr=lr: self.trained(base, domain, options, lr, out)  # noqa: E731
            row = self.measured(domain, f"scratch {name}, {self.told}", made)
            print(f"| {name} | {row['bytes'] / 1e3:.0f} kB | {row['loss']:.4f} | {start - row['loss']:.4f} |", flush=True)

    def differences(self, domain: str, tables: str) -> None:
        """The table of one fine-tune."""
        base, tuned = self.models / "base", self.models / domain
        start = self.measured(domain, "base", lambda out: str(base))["loss"]
        size = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
        whole = self.measured(domain, "fine-tune", lambda out: str(tuned), lambda out: size)

        def line(name: str, row: dict[str, Any]) -> None:
            share = (start - row["loss"]) / (start - whole["loss"])
            print(f"| {domain}: {name} | {row['bytes'] / 1e6:.2f} MB | {torch.tensor(row['loss']).exp():.2f} | {share:.1%} |", flush=True)

        line("base", {"loss": start, "bytes": 0})
        line("the fine-tune", whole)
        ways: dict[str, tuple[DeltaOptions, int]] = {
            "1 bit": (DeltaOptions(), 0),
            "1 bit, a scale for each row": (DeltaOptions(scale="row"), 0),
            "1 bit, nothing else stored": (DeltaOptions(rest=False), 0),
            **({"1 bit, scales distilled": (DeltaOptions(), 40)} if "scales" in tables else {}),
        }
        for name, (options, steps) in ways.items():
            made = lambda out, options=options, steps=steps: self.difference(base, tuned, domain, options, steps, out)  # noqa: E731
            line(name, self.measured(domain, f"delta {name}", made))

    def quantized(self, base: Path, adapter: Any, options: QuantizeOptions, lesson: Lesson | None, out: Path) -> str:
        save(quantize_adapter(adapter, options, self.base if lesson else None, lesson), out)
        return f"{base}+{out}"

    def trained(self, base: Path, domain: str, options: TrainAdapterOptions, lr: float, out: Path) -> str:
        save(train_adapter(self.base, self.lesson(domain, lr, self.steps, self.batch), options), out)
        return f"{base}+{out}"

    def difference(self, base: Path, tuned: Path, domain: str, options: DeltaOptions, steps: int, out: Path) -> str:
        lesson = self.lesson(domain, 3e-2, steps, 4, autocast=False) if steps else None
        save(delta(self.base, Checkpoint.open(tuned), options, lesson), out)
        return f"{base}+{out}"


def kept_bytes(folder: Path) -> int:
    """Bytes of the tensors, the sidecar and peft's configuration."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in KEPT)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100, help="of every training")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--domains", help="some of them: code,drama (default: all)")
    parser.add_argument("--tables", default="adapters,distilled,scratch,delta,scales", help="which of the tables")
    options = parser.parse_args()
    on()
    bench = Bench(options.models, options.texts, options.cache, options.steps, options.batch)
    domains = sorted(path.name.removeprefix("lora-") for path in options.models.iterdir() if path.name.startswith("lora-"))
    tuned = sorted(path.name for path in options.models.iterdir() if path.name != "base" and (path / "config.json").is_file())
    if options.domains:
        domains, tuned = ([name for name in found if name in options.domains.split(",")] for found in (domains, tuned))
    if "adapters" in options.tables or "distilled" in options.tables:
        for domain in domains:
            bench.adapters(domain, options.tables)
    if "scratch" in options.tables:
        for domain in domains:
            bench.scratch(domain)
    if "delta" in options.tables or "scales" in options.tables:
        print("\n| fine-tune | bytes | perplexity | of the gain |\n|---|---:|---:|---:|")
        for domain in tuned:
            bench.differences(domain, options.tables)


if __name__ == "__main__":
    main()
