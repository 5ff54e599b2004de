"""The pictures of a report, as matplotlib figures, and as SVG that takes the colours of the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .facts import Facts, Grid

INK, FAINT, ACCENT = "#1a1c1f", "#8a8f98", "#3465c4"  # of text, of axes, of bars: the page has others where it is dark
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", ACCENT: "var(--accent)"}
PRECISION = {"bits": "{:.1f}", "zeros": "{:.0%}", "error": "{:.2g}"}
SPAN = {"bits": 2.0, "zeros": 0.2, "error": 0.02}  # of the colours at least: what differs by less looks alike
CELLS = 24  # blocks whose cells have room for a number


def plots(facts: Facts) -> dict[str, Any]:
    """The figures that these facts have something for, by name. Errors: OptionError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise OptionError("a report needs matplotlib: pip install 'mergekit-plus[plot]'") from None
    matplotlib.use("Agg")
    made: dict[str, Any] = {"sizes": bars([label for label, _ in facts.sizes], [size / 1e6 for _, size in facts.sizes], "MB", "{:.3g}")}
    made |= {name: heat(grid, PRECISION[name], SPAN[name]) for name, grid in facts.grids.items()}
    if facts.sensitivity:
        made["sensitivity"] = heat(facts.sensitivity, "{:.1g}")
    if facts.frontier:
        made["frontier"] = frontier(facts.frontier, facts.unit)
    texts = [head.removeprefix("ppl ") for row in facts.table for head in row if head.startswith("ppl ")]
    for text in dict.fromkeys(texts):
        rows = [row for row in facts.table if f"ppl {text}" in row]
        made[f"perplexity {text}"] = bars([_short(str(row["model"])) for row in rows], [row[f"ppl {text}"] for row in rows], f"perplexity, {text}", "{:.4g}")
    return made


def bars(labels: Sequence[str], values: Sequence[float], unit: str, number: str) -> Any:
    """A bar for each value, its number at its end; the last, which is the output, stands out."""
    figure, axes = _figure(7.2, 0.5 + 0.32 * len(labels))
    colours = [FAINT] * (len(labels) - 1) + [ACCENT]
    axes.barh(range(len(labels)), values, color=colours, height=0.62)
    for place, value in enumerate(values):
        axes.annotate(number.format(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values, default=1))
    axes.set_xlabel(unit, color=FAINT, fontsize=9)
    return figure


def heat(grid: Grid, number: str, span: float = 0.0) -> Any:
    """A row for each kind of layer, a column for each block."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    blocks = sorted({block for row in grid.values() for block in row})
    figure, axes = _figure(2.4 + min(9.0, 0.52 * len(blocks)), 0.6 + 0.3 * len(grid))
    found = [value for row in grid.values() for value in row.values()]
    middle, half = (max(found) + min(found)) / 2, max(max(found) - min(found), span, 1e-12) / 2
    norm, colours = Normalize(middle - half, middle + half), colormaps["viridis"]
    for place, row in enumerate(grid.values()):
        for block, value in row.items():
            colour = colours(norm(value))
            axes.add_patch(_cell(blocks.index(block), place, colour))
            if len(blocks) <= CELLS:
                light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 0.55
                axes.text(blocks.index(block), place, number.format(value), ha="center", va="center", fontsize=7.5, color="black" if light else "white")
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    axes.set_yticks(range(len(grid)), list(grid))
    step = max(1, len(blocks) // CELLS)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block", color=FAINT, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def frontier(points: Sequence[tuple[float, float]], unit: str) -> Any:
    """The least loss that is predicted for each number of bits."""
    figure, axes = _figure(7.2, 2.8)
    axes.plot([bits for bits, _ in points], [loss for _, loss in points], color=ACCENT, marker="o", markersize=3.5, linewidth=1.6)
    axes.set_xlabel("stored bits a quantized weight", color=FAINT, fontsize=9)
    axes.set_ylabel(f"predicted loss ({unit or 'KL'})", color=FAINT, fontsize=9)
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    return figure


def as_svg(figure: Any) -> str:
    """A figure as SVG to stand in a page, in its font and colours; the same figure gives the same text."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"font: (?:[\w.%-]+ )*([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", stream.getvalue()[stream.getvalue().index("<svg") :])
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def save(facts: Facts, folder: Path, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Every picture of a report as files, dark on white."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in plots(facts).items():
        for kind in kinds:
            stem = re.sub(r"[^\w-]+", "-", name)
            written.append(folder / f"{stem}.{kind}")
            figure.savefig(written[-1], dpi=160, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    return figure, axes


def _cell(column: float, row: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour, linewidth=0)


def _short(label: str) -> str:
    return label if len(label) <= 36 else f"...{label[-33:]}"


