"""Perplexity against bytes: blocks removed, blocks that share, fewer bits, and blocks removed with fewer bits.

    python benchmarks/fold_pareto.py --work FOLDER [--model MODEL ...]        # as benchmarks/fold.py, whose FOLDER it goes on in
    python benchmarks/fold_pareto.py --work FOLDER --render table.md --plot docs/images/folding-pareto.svg

Removed are the sets that benchmarks/fold.py finds best, and half of all blocks by influence. Neighbours share in groups of two and three: with the weights of
the first (not cured; norms cured; norms and MaskLoRA cured), or with these, or their mean, and a low-rank voice for each block (norms, MaskLoRA on what is
shared and voices cured). Every cure reads the same windows, towards the model as it was; the rate of those that share is the better of two on the
validation text, for groups of two. Bits are those of GPTQ in groups of 128, calibrated on the windows on which the sets were found; nothing is
trained for them. Bytes are those of the tensors as they are stored: compact, or packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from fold import RATES, Bench, Row, arguments, best, read, shown

from mergekit_plus.checkpoint import Checkpoint
from prune.fold import Source, compacted, expanded, folded, mapped, relaxed
from quant import Scheme
from quant.calibrated import Calibration
from quant.plan import quantize

OURS = ("norms", "mask_lora")
BITS = (4, 3, 2)


class Pareto(Bench):
    """The points of the picture."""

    def point(self, kind: str, name: str, stored: Checkpoint, make: Callable[[], Checkpoint] | None = None) -> None:
        """A model as it is stored, and how it is made dense where it is not; its bytes are known from headers."""
        self.once({"what": "point", "kind": kind, "name": name}, lambda: {"bytes": stored.nbytes, **self.measure(make() if make else stored)})

    def run(self) -> None:
        """What matters most first, so that a run that is stopped early has it."""
        self.point("dense", "the model", self.checkpoint)
        for bits in BITS:
            self.quantized("fewer bits", "", self.checkpoint, bits)
        removed = self.removed()
        for count, checkpoint in removed.items():
            self.point("removed, cured", f"{count} removed", checkpoint)
        rate = self.rate_of_sharing()
        for share in (2, 3):
            self.shared(share, rate)
            self.voiced(share, "first", 16, rate)
        for bits in reversed(BITS):
            for count in (2, self.most, self.count // 2):
                self.quantized("removed, cured, fewer bits", f"{count} removed, ", removed[count], bits)
        for share in (2, 3):
            name, first = f"groups of {share}", self.first(share)
            self.point("shared, norms cured", name, first, partial(self.cured, f"{name} norms", lambda first=first: first, rate, OURS[:1]))
            for rank in (16, 4, 64):
                self.voiced(share, "average", rank, rate)
                self.voiced(share, "first", rank, rate)

    def quantized(self, kind: str, name: str, checkpoint: Checkpoint, bits: int) -> None:
        def make() -> Checkpoint:
            return quantize(checkpoint, Scheme(bits, 128), "gptq", format_name="dense", calibration=Calibration(self.calibration))

        self.point(kind, f"{name}{bits} bits", quantize(checkpoint, Scheme(bits, 128)), make)

    def removed(self) -> dict[int, Checkpoint]:
        """Without so many blocks, cured."""
        table = self.exhaustive()
        rate = self.rate(best(table, self.most))
        sets = {count: best(table, count) for count in range(1, self.most + 1)}
        sets |= {self.count // 2: self.chosen("influence", self.count // 2, table)}
        made = {count: partial(folded, self.checkpoint, self.without(removed)) for count, removed in sets.items()}
        return {count: self.cured(f"without {shown(removed)}", made[count], rate) for count, removed in sets.items()}

    def first(self, share: int) -> Checkpoint:
        return compacted(self.checkpoint, mapped(range(self.count), share))

    def rate_of_sharing(self) -> float:
        def validation(rate: float) -> float:
            return self.measured("groups of 2, cured", lambda: self.cured("groups of 2", lambda: self.first(2), rate), rate)["validation"]

        return min(RATES[1:], key=validation)

    def shared(self, share: int, rate: float) -> None:
        """Neighbours that share, as they are and cured."""
        name, first = f"groups of {share}", self.first(share)
        self.point("shared, not cured", name, first, lambda: expanded(first))
        self.point("shared, norms and MaskLoRA cured", name, first, lambda: self.cured(name, lambda: first, rate))

    def voiced(self, share: int, parent: Source, rank: int, rate: float) -> None:
        """Neighbours that share, each with a voice, cured."""
        name = f"groups of {share}, rank {rank} beside the {'mean' if parent == 'average' else parent}"
        voiced = relaxed(self.checkpoint, mapped(range(self.count), share, "sequence", parent), rank)
        self.point("shared, with voices, all cured", name, voiced, lambda: self.cured(name, lambda: voiced, rate, (*OURS, "lora")))


def points(rows: Sequence[Row]) -> list[Row]:
    return sorted((row for row in rows if row["what"] == "point"), key=lambda row: (row["bytes"], row["test"]))


def table(rows: Sequence[Row]) -> list[str]:
    """All points, the smallest first; in bold those that no smaller one is better than."""
    lines, least = ["| MB | | | perplexity |", "|---:|---|---|---:|"], math.inf
    for row in points(rows):
        value = f"{math.exp(row['test']):.1f}"
        lines.append(f"| {row['bytes'] / 1e6:.2f} | {row['name']} | {row['kind']} | {f'**{value}**' if row['test'] < least else value} |")
        least = min(least, row["test"])
    return lines


def plot(rows: Sequence[Row], out: Path) -> None:
    """Perplexity over megabytes, both on logarithmic axes, a line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    kinds = dict.fromkeys(row["kind"] for row in rows if row["what"] == "point")
    for kind, marker in zip(kinds, "*osvD^PX", strict=False):
        found = [row for row in points(rows) if row["kind"] == kind]
        axes.plot([row["bytes"] / 1e6 for row in found], [math.exp(row["test"]) for row in found], marker=marker, linewidth=1, label=kind)
    axes.set(xscale="log", yscale="log", xlabel="MB", ylabel="perplexity")
    for axis, ticks in ((axes.xaxis, (6, 8, 10, 12, 16, 20, 24)), (axes.yaxis, (70, 80, 100, 120, 150, 200, 300, 500, 1000, 2000))):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--render", type=Path, help="write the table of what is measured to this file")
    parser.add_argument("--plot", type=Path, help="and a picture")
    given = parser.parse_args()
    rows = read(given.work / "results.jsonl")
    if given.render:
        given.render.write_text("\n".join(table(rows)) + "\n")
    if given.plot:
        plot(rows, given.plot)
    if not (given.render or given.plot):
        given.work.mkdir(parents=True, exist_ok=True)
        Pareto(given).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
