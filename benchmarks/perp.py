"""What retraining gives back after pruning: perplexity of a pruned model alone, reconstructed, and retrained by each variant at equal tokens.

    python benchmarks/perp.py --model MODEL --texts TEXTS --results results.jsonl          # goes on where it was stopped
    python benchmarks/perp.py --results results.jsonl --render table.md --plot docs/retraining.svg

TEXTS holds `general.train.txt` (on which is calibrated and trained: what the model itself was trained on, so that what comes back is what pruning took),
`wiki.val.txt` (by which rates and the best states are chosen) and `wiki.test.txt` (which is reported: 40 windows of 256 tokens). Every training has 40 steps
of 2 windows of 128 tokens, the same ones for a seed. The rate of each variant is the best of three on the validation text, at 50 % by magnitude with
seed 0, and is used everywhere. Weights are rounded to the model's dtype before they are measured.
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
WINDOW = 128
OURS = "norms+mask_lora"  # the model has no biases
FULL_RATES, RATES = (3e-5, 1e-4, 3e-4), (1e-3, 3e-3, 1e-2)
VARIANTS = (
    "norms", "mask_lora", OURS, "full", OURS + ", distilled", OURS + ", muon", "full, muon", "scale_lora", "neuroada", "hut", "lora_prune",
    "norms+head+mask_lora",
)  # fmt: skip
RECONSTRUCTION = ReconstructOptions(training=TrainOptions(steps=16, lr=1e-3, batch=1, evaluations=2, dropout=False))
Row = dict[str, Any]


class Bench:
    """The model, the texts, and the results so far."""

    def __init__(self, model: Path, texts: Path, results: Path, training: TrainOptions) -> None:
        self.checkpoint, self.results, self.training = Checkpoint.open(model), results, training
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
        facts = {"parameters": sum(p.numel() for p in adapted.parameters.values()), "optimizer_bytes": record.optimizer_bytes}
        with torch.no_grad():
            for tensor in adapted.merge().values():
                tensor.copy_(tensor.to(torch.bfloat16))
        return model, {**facts, "heldout": record.value, "best": record.best}

    def trained(self, pruner: str, level: str, variant: str, seed: int, rate: float) -> Row:
        def compute() -> Row:
            model, facts = self.fit(pruner, level, variant, replace(self.training, lr=rate, seed=seed))
            return {**facts, "ppl": self.measure(model)}

        return self.once({"pruner": pruner, "level": level, "retrained": variant, "seed": seed, "lr": rate}, compute)

    def cell(self, pruner: str, level: str, variant: str, seed: int = 0) -> None:
        if variant in ("alone", "reconstructed"):
            key = {"pruner": pruner, "level": level, "retrained": variant, "seed": seed}
            self.once(key, lambda: {"ppl": self.measure(self.pruned(pruner, level, variant == "reconstructed"))})
            return
        tuned = variant.removesuffix(", distilled")
        for rate in FULL_RATES if tuned.startswith("full") else RATES:
            self.trained("magnitude", "0.5", tuned, 0, rate)
        self.trained(pruner, level, variant, seed, best_rate(self.done, tuned))

    def run(self) -> None:
        """What matters most first, so that a run that is stopped early has it."""
        self.cell("none", "dense", "alone")
        for pruner, level, variant, seed in order():
            self.cell(pruner, level, variant, seed)


def order() -> Iterator[tuple[str, str, str, int]]:
    for seed in (0, 1, 2):
        for variant in ("alone", OURS, "full")[seed > 0 :]:
            yield "magnitude", "0.5", variant, seed
    for level, pruner in (("0.5", "sparsegpt"), ("0.7", "magnitude"), ("0.7", "sparsegpt"), ("2:4", "magnitude"), ("2:4", "sparsegpt")):
        for variant in ("alone", OURS, "full"):
            yield pruner, level, variant, 0
    for level, pruner in (("0.5", "magnitude"), ("0.7", "magnitude"), ("0.5", "sparsegpt")):
        yield pruner, level, "reconstructed", 0
    for variant in ("norms", OURS + ", distilled", "neuroada", "scale_lora"):
        yield "magnitude", "0.5", variant, 0
    for level in LEVELS:
        for pruner in PRUNERS:
            for variant in ("alone", OURS, "full", "norms", "reconstructed"):
                yield pruner, level, variant, 0
    for variant in VARIANTS:
        yield "magnitude", "0.5", variant, 0
    yield "none", "dense", "full", 0
    for seed in (1, 2):
        for pruner in PRUNERS[1:]:
            for variant in (OURS, "full"):
                yield pruner, "0.5", variant, seed


# ---- the table ----


def best_rate(rows: Sequence[Row], variant: str) -> float:
    """The rate that did best on the validation text."""
    found = {row["lr"]: row["heldout"] for row in rows if _is(row, "magnitude", "0.5", variant) and row["seed"] == 0}
    return min(found, key=lambda rate: found[rate])


def _is(row: Row, pruner: str, level: str, variant: str) -> bool:
    return (row["pruner"], row["level"], row["retrained"]) == (pruner, level, variant)


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: Sequence[Row]) -> list[str]:
    """Perplexities, one line a sparsity and pruner; means over seeds, with their standard deviation, where there are several."""
    dense, trained = (_values(rows, "none", "dense", variant) for variant in ("alone", "full"))
    columns = ("alone", "reconstructed", "norms", OURS, "full")
    told = f"Dense: {_shown(dense)}{f'; dense and trained as all the others (full): {_shown(trained)}' if trained else ''}."
    lines = [told, "", f"| sparsity | pruned by | {' | '.join(columns)} | mended by {OURS} | by full |", "|---" * (len(columns) + 4) + "|"]
    for level in LEVELS:
        for pruner in PRUNERS:
            found = {column: _values(rows, pruner, level, column) for column in columns}
            if found["alone"]:
                cells = [_shown(found[column]) for column in columns]
                mended = [_mended(found["alone"], found[column], dense) for column in (OURS, "full")]
                lines.append(f"| {level} | {pruner} | {' | '.join((*cells, *mended))} |")
    lines += ["", "| at 0.5, magnitude | rate | parameters | optimiser | perplexity | mended |", "|---|---|---|---|---|---|"]
    whole = next((row["optimizer_bytes"] for row in rows if row["retrained"] == "full"), math.nan)
    for variant in VARIANTS:
        if values := _values(rows, "magnitude", "0.5", variant):
            row = next(row for row in rows if _is(row, "magnitude", "0.5", variant))
            facts = f"{_rate(rows, variant):g} | {row['parameters']:,} | {row['optimizer_bytes'] / whole:.1%}"
            lines.append(f"| {variant} | {facts} | {_shown(values)} | {_mended(_values(rows, 'magnitude', '0.5', 'alone'), values, dense)} |")
    return lines


def _rate(rows: Sequence[Row], variant: str) -> float:
    return best_rate(rows, variant.removesuffix(", distilled"))


def _values(rows: Sequence[Row], pruner: str, level: str, variant: str) -> list[float]:
    """Perplexities at the chosen rate, a seed each."""
    found = [row for row in rows if _is(row, pruner, level, variant)]
    return [row["ppl"] for row in found if "lr" not in row or row["lr"] == _rate(rows, variant)]


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = math.fsum(values) / len(values)
    spread = f" ± {torch.tensor(values).std().item():.1f}" if len(values) > 1 else ""
    return f"{mean:,.1f}{spread}"


def _mended(alone: Sequence[float], values: Sequence[float], dense: Sequence[float]) -> str:
    """The part of what pruning took of the perplexity that is back."""
    if not (alone and values and dense):
        return ""
    before, after, best = (math.fsum(each) / len(each) for each in (alone, values, dense))
    return f"{(before - after) / (before - best):.0%}"


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
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--batch", type=int, default=TRAINING.batch, help="windows of 128 tokens")
    parser.add_argument("--render", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.render:
        given.render.write_text("\n".join(table(read(given.results))) + "\n")
    if given.plot:
        plot(read(given.results), given.plot)
    if not (given.render or given.plot):
        torch.set_num_threads(1)
        Bench(given.model, given.texts, given.results, replace(TRAINING, steps=given.steps, batch=given.batch)).run()


if __name__ == "__main__":
    main()
