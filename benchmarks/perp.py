"""What retraining gives back after pruning: perplexity of a pruned model alone, reconstructed, and retrained by each variant at equal tokens.

    python benchmarks/perp.py --model MODEL --texts TEXTS --results results.jsonl          # goes on where it was stopped
    python benchmarks/perp.py --results results.jsonl --render table.md --plot docs/retraining.svg

TEXTS holds `general.train.txt` (on which is calibrated and trained: what the model itself was trained on, so that what comes back is what pruning took),
`wiki.val.txt` (by which rates and the best states are chosen) and `wiki.test.txt` (which is reported: 40 windows of 256 tokens). Every training has 40 steps
of 2 windows of 128 tokens, the same ones for a seed. The rate of each variant is the best of three on the validation text after 12 steps at 50 % by
magnitude, and is used everywhere. Weights are rounded to the model's dtype before they are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_plus.calibration import Block, read_text, walk
from mergekit_plus.checkpoint import Checkpoint, Work
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.training import TrainOptions, distillation, loss_on, next_token, train
from prune import Sparsity, sparsegpt, wanda
from prune.masks import lowest, lowest_of_rows
from prune.perp import adapt, sites_of
from prune.reconstruct import ReconstructOptions, reconstruct

LEVELS = ("0.5", "0.6", "0.7", "2:4")
PRUNERS = ("magnitude", "wanda", "sparsegpt")
TRAINING = TrainOptions(steps=40, batch=2, evaluations=1, autocast=True)
WINDOW, TUNING_STEPS = 128, 12
OURS = "norms+mask_lora"  # the model has no biases
FULL_RATES, RATES = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2)
VARIANTS = (
    "norms", "mask_lora", OURS, "full", OURS + ", distilled", OURS + ", muon", "full, muon", "scale_lora", "neuroada", "hut", "lora_prune",
    "norms+head+mask_lora",
)  # fmt: skip
RECONSTRUCTION = ReconstructOptions(training=TrainOptions(steps=16, lr=1e-3, batch=1, evaluations=2, dropout=False))
Row = dict[str, Any]


class Bench:
    """The model, the texts, and the results so far."""

    def __init__(self, model: Path, texts: Path, results: Path) -> None:
        self.checkpoint, self.results = Checkpoint.open(model), results
        tokenizer = load_tokenizer(self.checkpoint)
        self.calibration = read_text([texts / "general.train.txt"], tokenizer, 16, 256)
        self.rows = read_text([texts / "general.train.txt"], tokenizer, 1 << 30, WINDOW)
        self.held = read_text([texts / "wiki.val.txt"], tokenizer, 12, WINDOW)
        self.test = tokenize(tokenizer, (texts / "wiki.test.txt").read_text()[:200_000])
        self.dense = load_model(self.checkpoint)
        self.sites = sites_of(self.checkpoint)
        self.done = read(results)

    def once(self, key: Mapping[str, Any], compute: Callable[[], Row]) -> Row:
        """The row of a key, computed unless it is there."""
        for row in self.done:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        started = time.process_time()
        row = {**key, **compute(), "seconds": round(time.process_time() - started, 1)}
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.append(row)
        print(row, flush=True)
        return row

    def pruned(self, pruner: str, level: str, rebuilt: bool = False) -> Any:
        """The model with the pruned weights, made once and kept beside the results."""
        if pruner == "none":
            return deepcopy(self.dense)
        file = self.results.with_name(f"{pruner}-{level.replace(':', 'of')}{'-rebuilt' if rebuilt else ''}.safetensors")
        if not file.exists():
            save_file({name: tensor.contiguous() for name, tensor in self.walk(pruner, level, rebuilt).items()}, file)
        model, places = deepcopy(self.dense), {site.name: site.parameter for site in self.sites}
        with torch.no_grad():
            for name, tensor in load_file(file).items():
                model.get_parameter(places[name]).copy_(tensor)
        return model

    def walk(self, pruner: str, level: str, rebuilt: bool) -> dict[str, Tensor]:
        """The pruned weights in the checkpoint's dtype, and with `rebuilt` what reconstruction by norms and MaskLoRA makes of them."""
        sparsity = Sparsity.of(None, level) if ":" in level else Sparsity.of(float(level))
        found: dict[str, Tensor] = {}

        def process(block: Block) -> dict[str, Tensor]:
            targets = list(block.outputs()) if rebuilt else []
            moments = block.moments() if pruner != "magnitude" else {}
            for name, weight in block.weights.items():
                if pruner == "sparsegpt":
                    weight.copy_(sparsegpt(weight, sparsity, moments=moments[name]))
                    continue
                scores = wanda(weight, moments=moments[name]) if pruner == "wanda" else weight.abs()
                by_row = pruner == "wanda" or sparsity.group
                gone = lowest_of_rows(scores, sparsity) if by_row else lowest(scores.flatten(), sparsity.count(scores.numel())).view_as(scores)
                weight.masked_fill_(gone, 0)
            tensors = {name: weight.clone() for name, weight in block.weights.items()}
            if rebuilt:
                tensors |= reconstruct(block, targets, OURS.split("+"), RECONSTRUCTION).tensors
            found.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
            return found

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            walk(self.checkpoint, self.calibration, process, Work(Path(folder)))
        return found

    def measure(self, model: Any) -> float:
        return perplexity(model, self.test, window=256, limit=40).value

    def fit(self, pruner: str, level: str, variant: str, options: TrainOptions) -> tuple[Any, Row]:
        """A pruned model, retrained: the model, and what it took."""
        model = self.pruned(pruner, level)
        names, _, how = variant.partition(", ")
        adapted = adapt(model, self.sites, names.split("+"), {}, options.seed)
        loss = distillation(self.dense) if how == "distilled" else next_token
        options = replace(options, optimizer="muon") if how == "muon" else options
        record = train(model, adapted.parameters, loss, self.rows, options, masks=adapted.masks, evaluate=lambda: loss_on(model, self.held))
        facts = {"lr": options.lr, "parameters": sum(p.numel() for p in adapted.parameters.values()), "optimizer_bytes": record.optimizer_bytes}
        with torch.no_grad():
            for tensor in adapted.merge().values():
                tensor.copy_(tensor.to(torch.bfloat16))
        return model, {**facts, "heldout": record.value, "best": record.best}

    def rate(self, variant: str) -> float:
        """The best of three rates."""
        variant = variant.removesuffix(", distilled")

        def compute(rate: float) -> Row:
            options = replace(TRAINING, lr=rate, steps=TUNING_STEPS, evaluations=1)
            return {"heldout": self.fit("magnitude", "0.5", variant, options)[1]["heldout"]}

        rates = FULL_RATES if variant.startswith("full") else RATES
        found = {rate: self.once({"tuned": variant, "rate": rate}, lambda rate=rate: compute(rate))["heldout"] for rate in rates}  # type: ignore[misc]
        return min(found, key=lambda rate: found[rate])

    def cell(self, pruner: str, level: str, variant: str, seed: int = 0) -> None:
        key = {"pruner": pruner, "level": level, "retrained": variant, "seed": seed}

        def compute() -> Row:
            if variant in ("alone", "reconstructed"):
                return {"ppl": self.measure(self.pruned(pruner, level, variant == "reconstructed"))}
            model, facts = self.fit(pruner, level, variant, replace(TRAINING, lr=self.rate(variant), seed=seed))
            return {**facts, "ppl": self.measure(model)}

        self.once(key, compute)

    def run(self) -> None:
        """What matters most first, so that a run that is stopped early has it."""
        self.cell("none", "dense", "alone")
        for pruner, level, variant, seed in order():
            self.cell(pruner, level, variant, seed)


def order() -> Iterator[tuple[str, str, str, int]]:
    for seed in (0, 1, 2):
        for variant in ("alone", OURS, "full")[seed > 0 :]:
            yield "magnitude", "0.5", variant, seed
    yield "none", "dense", "full", 0
    for level in LEVELS:
        for pruner in PRUNERS:
            for variant in ("alone", OURS, "full"):
                yield pruner, level, variant, 0
    for variant in VARIANTS:
        yield "magnitude", "0.5", variant, 0
    for variant in ("reconstructed", "norms"):
        for level in LEVELS:
            for pruner in PRUNERS:
                yield pruner, level, variant, 0
    for seed in (1, 2):
        for pruner in PRUNERS[1:]:
            for variant in (OURS, "full"):
                yield pruner, "0.5", variant, seed


# ---- the table ----


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: Sequence[Row]) -> list[str]:
    """Perplexities, one line a sparsity and pruner; means over seeds, with their standard deviation, where there are several."""
    dense, trained = (_values(rows, "none", "dense", variant) for variant in ("alone", "full"))
    columns = ("alone", "reconstructed", "norms", OURS, "full")
    told = f"Dense: {_shown(dense)}; dense and trained on the same text as all the others: {_shown(trained)}."
    lines = [told, "", f"| sparsity | pruned by | {' | '.join(columns)} | recovered |", "|---" * (len(columns) + 3) + "|"]
    for level in LEVELS:
        for pruner in PRUNERS:
            found = {column: _values(rows, pruner, level, column) for column in columns}
            if found["alone"]:
                cells = [_shown(found[column]) for column in columns]
                lines.append(f"| {level} | {pruner} | {' | '.join(cells)} | {_recovered(found['alone'], found[OURS], found['full'])} |")
    lines += ["", "| at 0.5, magnitude | parameters | optimiser | perplexity | recovered |", "|---|---|---|---|---|"]
    alone, full = _values(rows, "magnitude", "0.5", "alone"), _values(rows, "magnitude", "0.5", "full")
    whole = next((row["optimizer_bytes"] for row in rows if row.get("retrained") == "full"), math.nan)
    for variant in VARIANTS:
        values = _values(rows, "magnitude", "0.5", variant)
        if values:
            row = next(row for row in rows if row.get("retrained") == variant)
            share = f"{row['optimizer_bytes'] / whole:.1%}"
            lines.append(f"| {variant} (rate {row['lr']:g}) | {row['parameters']:,} | {share} | {_shown(values)} | {_recovered(alone, values, full)} |")
    return lines


def _values(rows: Sequence[Row], pruner: str, level: str, variant: str) -> list[float]:
    return [row["ppl"] for row in rows if (row.get("pruner"), row.get("level"), row.get("retrained")) == (pruner, level, variant)]


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = math.fsum(values) / len(values)
    spread = f" ± {torch.tensor(values).std().item():.1f}" if len(values) > 1 else ""
    return f"{mean:,.1f}{spread}"


def _recovered(alone: Sequence[float], ours: Sequence[float], full: Sequence[float]) -> str:
    """The part of what full retraining recovers of the perplexity."""
    if not (alone and ours and full):
        return ""
    mean = [math.fsum(values) / len(values) for values in (alone, ours, full)]
    return f"{(mean[0] - mean[1]) / (mean[0] - mean[2]):.0%}"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Perplexity over sparsity, a picture a pruner."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PRUNERS), figsize=(11, 3.6), sharey=True)
    (dense,) = _values(rows, "none", "dense", "alone")
    for axis, pruner in zip(axes, PRUNERS, strict=True):
        for variant in ("alone", "reconstructed", "norms", OURS, "full"):
            means = {level: values for level in LEVELS if (values := _values(rows, pruner, level, variant))}
            axis.plot([LEVELS.index(level) for level in means], [sum(values) / len(values) for values in means.values()], marker="o", label=variant)
        axis.axhline(dense, color="grey", linestyle=":", label="dense")
        axis.set(title=pruner, yscale="log", xticks=range(len(LEVELS)), xticklabels=LEVELS, xlabel="sparsity")
    axes[0].set_ylabel("perplexity")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--render", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.render:
        given.render.write_text("\n".join(table(read(given.results))) + "\n")
    if given.plot:
        plot(read(given.results), given.plot)
    if not (given.render or given.plot):
        torch.set_num_threads(1)
        Bench(given.model, given.texts, given.results).run()


if __name__ == "__main__":
    main()
