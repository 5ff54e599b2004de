"""Perplexity and KL of allocated bits beside uniform ones at equal file size, greedy, inverted, and AutoRound's AutoScheme.

    python benchmarks/allocation.py --model MODEL --calibration TRAIN.txt --test TEST.txt --work FOLDER [--autoscheme PYTHON] [--plot predicted.png]

All rows round to nearest in groups of 128, from the same losses (KL of single groups, the rest at 4 bits), choices 2, 3, 4 and 6 bits. `allocated` is what
`compress allocate` keeps of 8 candidates, `optimum` is the proven one of the sum of losses, `greedy` raises the group that gains most for a bit while
one fits, `inverted` solves with the losses of the most sensitive groups exchanged for those of the least sensitive. The budgets "uniform 3" and
"uniform 4" are the size of all layers at that width, "as AutoScheme" that of what it chose, to the bit. AutoScheme's layers are stored and measured as ours;
PYTHON is an interpreter with auto-round in it. FOLDER keeps what was measured: a second run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div

from mergekit_plus.calibration.options import CalibrationOptions
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.evaluate import load_model, load_tokenizer, log_probabilities, tokenize, windows
from mergekit_plus.progress import on
from quant.allocate import solve
from quant.allocation import AllocateOptions, allocate_bits
from quant.layer_groups import file_size, groups_of, stored_bits, weights_of
from quant.mixed import Budget, schemes
from quant.plan import quantize
from quant.quantized import Scheme
from quant.sensitivity import Sensitivities

CHOICES = (2, 3, 4, 6)
GROUP = 128
Row = dict[str, Any]


def greedy(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The change of one group that gains most for a bit, while one fits."""
    at = [row.index(min(row)) for row in costs]
    while True:
        left = budget - sum(row[choice] for row, choice in zip(costs, at, strict=True))
        moves = [
            ((losses[group][at[group]] - loss) / (cost - costs[group][at[group]]), group, choice)
            for group in range(len(at))
            for choice, (loss, cost) in enumerate(zip(losses[group], costs[group], strict=True))
            if 0 < cost - costs[group][at[group]] <= left and loss < losses[group][at[group]]
        ]
        if not moves:
            return at
        _, group, choice = max(moves)
        at[group] = choice


def inverted(losses: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The losses of the most sensitive group in the place of the least sensitive one's, and so on."""
    order = sorted(range(len(losses)), key=lambda group: losses[group][0])
    mirror = dict(zip(order, reversed(order), strict=True))
    return [losses[mirror[group]] for group in range(len(losses))]


class Bench:
    """The model, the test text, and the results so far."""

    def __init__(self, model: Path, test: Path, work: Path, count: int) -> None:
        self.checkpoint, self.cache = Checkpoint.open(model), work / "rows.jsonl"
        self.done: dict[str, Row] = dict(json.loads(line) for line in self.cache.read_text().splitlines()) if self.cache.is_file() else {}
        model = load_model(self.checkpoint)
        self.rows = windows(model, tokenize(load_tokenizer(self.checkpoint), test.read_text()), 256, count)
        self.targets = list(log_probabilities(model, self.rows))

    def measure(self, name: str, layers: Scheme | Mapping[str, Scheme], **more: Any) -> Row:
        """A row; what is in the cache is not measured again, under whatever name."""
        key = repr(layers) if isinstance(layers, Scheme) else repr(sorted(layers.items(), key=str))
        known = next((row for row in self.done.values() if row["layers"] == key), None)
        if known is None:
            model = load_model(quantize(self.checkpoint, layers, format_name="dense"))
            known = {"MB": file_size(quantize(self.checkpoint, layers)) / 1e6, "layers": key, **self.losses(model)}
        if name not in self.done:
            self.done[name] = {**{head: known[head] for head in ("MB", "layers", "perplexity", "KL")}, **more}
            with self.cache.open("a") as stream:
                stream.write(json.dumps([name, self.done[name]]) + "\n")
        return self.done[name]

    def losses(self, model: Any) -> Row:
        """Perplexity and KL from the dense model, nats a token."""
        nll, kl = 0.0, 0.0
        for here, there, row in zip(log_probabilities(model, self.rows), self.targets, self.rows, strict=True):
            nll -= float(here.gather(1, row[1:, None]).mean())
            kl += float(kl_div(here, there, log_target=True, reduction="sum")) / len(here)
        return {"perplexity": math.exp(nll / len(self.rows)), "KL": kl / len(self.rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "test", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--autoscheme", type=Path)
    parser.add_argument("--sensitivity", default="kl")
    parser.add_argument("--windows", type=int, default=18, help="of the calibration text, a third of them held out")
    parser.add_argument("--window", type=int, default=128, help="tokens in one")
    parser.add_argument("--test-windows", type=int, default=40, help="of 256 tokens")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.model, asked.test, asked.work, asked.test_windows)
    choices = tuple(Scheme(bits, GROUP) for bits in CHOICES)
    groups = groups_of(bench.checkpoint, choices[0])
    costs, weights = stored_bits(bench.checkpoint, groups, choices, "pack-quantized"), weights_of(bench.checkpoint, groups)
    saved = asked.work / f"{asked.sensitivity}.json"

    def allocated(bits: int) -> Any:
        text = CalibrationOptions(texts=[str(asked.calibration)], windows=asked.windows, window=asked.window)
        options = AllocateOptions(Budget(bits_per_weight=(bits + 0.5) / weights), choices, text, asked.sensitivity, sensitivities=saved, overwrite=True)
        return allocate_bits(bench.checkpoint, options, asked.work / "bits.yaml", on())

    budgets = {f"{bits:.1f}": math.floor(bits * weights) for bits in (3.0, 3.5, 4.0)}
    budgets |= {f"uniform {bits}": sum(row[CHOICES.index(bits)] for row in costs) for bits in (3, 4)}
    rows: dict[str, Row] = {label: bench.measure(label, Scheme(int(label[-1]), GROUP)) for label in budgets if label.startswith("uniform")}
    peers = autoscheme(asked, [bits / weights for bits in budgets.values()]) if asked.autoscheme else [None] * len(budgets)
    layers = partial(schemes, bench.checkpoint, groups, choices)
    for label, peer in list(zip(budgets, peers, strict=True)):
        if peer is not None:
            rows[f"{label} AutoScheme"] = bench.measure(f"{label} AutoScheme", {module: Scheme(width, GROUP) for module, width in peer["bits"].items()})
            own = [peer["bits"][group[0].removesuffix(".weight")] for group in groups]
            budgets[f"as AutoScheme {label}"] = sum(row[CHOICES.index(width)] for row, width in zip(costs, own, strict=True))
    points: list[list[float]] = []
    for label, bits in budgets.items():
        name = f"{label} allocated"
        if name not in bench.done:
            result = allocated(bits).result
            tried = [[one.predicted, one.measured] for one in result.candidates]
            bench.measure(name, layers(result.chosen.selection), predicted=result.chosen.predicted, tried=tried, proven=result.solution.proven)
        rows[name] = bench.done[name]
        points += rows[name]["tried"]
        if label.startswith("as AutoScheme"):
            continue
        table = Sensitivities.read(saved)
        others = {
            "optimum": solve(table.losses, costs, bits).choices, "greedy": greedy(table.losses, costs, bits),
            "inverted": solve(inverted(table.losses), costs, bits).choices,
        }  # fmt: skip
        for kind, chosen in others.items():
            rows[f"{label} {kind}"] = bench.measure(f"{label} {kind}", layers(chosen), predicted=table.predicted(chosen))
    print("| budget | MB | perplexity | KL | predicted KL |\n|---|---|---|---|---|")
    for name in sorted(rows, key=lambda name: (rows[name]["MB"] // 0.02, rows[name]["KL"])):
        row = rows[name]
        predicted = f"{row['predicted']:.4f}" if "predicted" in row else ""
        print(f"| {name} | {row['MB']:.3f} | {row['perplexity']:.2f} | {row['KL']:.4f} | {predicted} |")
    if asked.plot:
        draw(rows, points, asked.plot)


def autoscheme(asked: argparse.Namespace, averages: Sequence[float]) -> list[Any]:
    """AutoScheme's bits for each average."""
    out, texts = (asked.work / "autoscheme.json").absolute(), (asked.work / "calibration.jsonl").absolute()
    if not out.exists():
        text = asked.calibration.read_text()
        texts.write_text("".join(json.dumps({"text": text[start : start + 4000]}) + "\n" for start in range(0, 64 * 8000, 8000)))
        script = Path(__file__).with_name("allocation_autoscheme.py")
        subprocess.run([asked.autoscheme, script, asked.model.absolute(), texts, out, str(GROUP), ",".join(map(str, CHOICES)), *map(str, averages)], check=True)
    return list(json.loads(out.read_text()).values())


def draw(rows: Mapping[str, Row], points: Sequence[Sequence[float]], path: Path) -> None:
    """Predicted against measured KL: of the candidates on held-out windows, and of the table's rows on the test text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    series = {
        "candidates, held-out calibration text": points,
        "optima and greedy, test text": [(row["predicted"], row["KL"]) for name, row in rows.items() if "predicted" in row and "inverted" not in name],
        "inverted, test text": [(row["predicted"], row["KL"]) for name, row in rows.items() if "inverted" in name],
    }
    every = [value for pairs in series.values() for pair in pairs for value in pair]
    line = [min(every) * 0.9, max(every) * 1.1]
    axes.plot(line, line, color="#999999", linewidth=1)
    for (label, pairs), marker in zip(series.items(), "o^s", strict=True):
        axes.scatter(*zip(*pairs, strict=True), label=label, marker=marker, s=28)
    axes.set(xscale="log", yscale="log", xlabel="predicted KL: reference point + sum of losses (nats a token)", ylabel="measured KL (nats a token)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
