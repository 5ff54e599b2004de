"""Recipes and models side by side on every text: what each recipe makes is measured as it is computed, and nothing of it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, SaveOptions
from .checks import Checks, Row, measure
from .errors import CheckpointError, OptionError, nearest
from .progress import Progress, quiet
from .recipe import build, load, with_found
from .steps import Execution

PICTURES = (".svg", ".png", ".pdf")


def compare(
    refs: Mapping[str, str], checks: Checks, base: str | None = None, experts: Mapping[str, str] | None = None,
    plot: Path | None = None, progress: Progress | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each recipe or model by its name: size, perplexity on each text, and the mean over the texts of its logarithm.

    With a base and the experts of some texts: normalised losses too, `(base - loss) / (base - expert)` in nats, which are 0 for the base and 1 for the
    expert on its own text (more is better), their mean and their worst. A recipe with a search is searched first.
    plot: where `draw` shall draw, so that it is refused before the work.
    Errors: OptionError; RecipeError and CheckpointError for what cannot be opened, all before the first measurement.
    """
    experts, progress = experts or {}, progress or quiet()
    if found := [*checks.problems(Path()), *_problems(checks, base, experts)]:
        raise OptionError("; ".join(found))
    if plot is not None:
        check_picture(plot)
    how = Execution(SaveOptions(progress=progress))
    made = {name: _open(ref, how) for name, ref in refs.items()}
    reference = {ref: measure(Checkpoint.open(ref), checks, Path(), progress) for ref in dict.fromkeys([*([base] if base else []), *experts.values()])}
    rows = []
    for name, checkpoint in made.items():
        row = {**measure(checkpoint, checks, Path(), progress), "model": name}
        row["mean log"] = math.fsum(math.log(row[f"ppl {text}"]) for text in checks.texts) / len(checks.texts)
        if base:
            shares = {text: _normalised(row, reference[base], reference[ref], text) for text, ref in experts.items()}
            row |= {f"norm {text}": share for text, share in shares.items()}
            row |= {"norm mean": math.fsum(shares.values()) / len(shares), "norm worst": min(shares.values())}
        rows.append(row)
    return rows


def _problems(checks: Checks, base: str | None, experts: Mapping[str, str]) -> list[str]:
    found = [] if checks.texts else ["compare: it needs a text; give one with --text NAME=FILE"]
    if bool(base) != bool(experts):
        found.append("compare: normalised losses need both --base MODEL and --expert TEXT=MODEL")
    return found + [f"compare: --expert {name}: there is no text '{name}'.{nearest(name, checks.texts)}" for name in experts if name not in checks.texts]


def _open(ref: str, how: Execution) -> Checkpoint:
    """A model, or what a recipe makes."""
    if not ref.endswith((".yaml", ".yml")):
        return Checkpoint.open(ref)
    recipe = load(Path(ref))
    built = build(recipe, how)
    return build(with_found(recipe, built.inputs, how), how).result if recipe.is_open else built.result


def _normalised(row: Row, base: Row, expert: Row, text: str) -> float:
    loss, start, goal = (math.log(each[f"ppl {text}"]) for each in (row, base, expert))
    if not goal < start:
        raise CheckpointError(f"compare: on the text {text} the expert {expert['model']} is no better than the base, so that nothing can be normalised")
    return (start - loss) / (start - goal)


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn."""
    if path.suffix.lower() not in PICTURES:
        raise OptionError(f"--plot {path}: the name must end in one of {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install 'mergekit-plus[plot]'") from None


def draw(rows: Sequence[Row], texts: Sequence[str], path: Path) -> None:
    """A picture of the rows: a line for each text, a point for each model in its own colour; perplexities, or normalised losses where there are some."""
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    normalised = any(head.startswith("norm ") for row in rows for head in row)
    lines = _lines(rows, texts, normalised)
    height = 1.2 + 0.55 * len(lines) + 0.22 * math.ceil(len(rows) / 3)
    figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    spread = 0.6 / max(1, len(rows) - 1)
    for index, row in enumerate(rows):
        places = [number + (index - (len(rows) - 1) / 2) * spread * (len(rows) > 1) for number in range(len(lines))]
        axes.scatter([value(row) for value in lines.values()], places, s=46, color=_colour(index, len(rows)), marker=MARKERS[index % len(MARKERS)],
                     label=row["model"], zorder=3, edgecolors="white", linewidths=0.6)  # fmt: skip
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    axes.set_ylim(len(lines) - 0.5, -0.5)
    for number in range(len(lines) - 1):
        axes.axhline(number + 0.5, color="#dddddd", linewidth=0.8)
    _label(axes, normalised)
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "compare"}):  # the same rows, the same bytes
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


MARKERS = "osD^vPX<>h"


def _lines(rows: Sequence[Row], texts: Sequence[str], normalised: bool) -> dict[str, Any]:
    """What is drawn on each line, from top to bottom: its label, and the value of a row."""
    if normalised:
        heads = [head for head in rows[0] if head.startswith("norm ")]
        return {head.removeprefix("norm "): (lambda row, head=head: row[head]) for head in heads}
    return {**{text: (lambda row, text=text: row[f"ppl {text}"]) for text in texts},
            **({"mean": lambda row: math.exp(row["mean log"])} if len(texts) > 1 else {})}  # fmt: skip


def _colour(index: int, of: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](index) if of <= 10 else colormaps["turbo"](0.05 + 0.9 * index / (of - 1))


def _label(axes: Any, normalised: bool) -> None:
    """The horizontal axis: where the base and the experts are, or perplexity with round numbers on a logarithmic scale."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    if normalised:
        for place, style in ((0, "--"), (1, "-")):
            axes.axvline(place, color="#777777", linestyle=style, linewidth=1.2, zorder=2)
        axes.set_xlabel("normalised loss: 0 = base, 1 = each expert on its own text (more is better)")
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("perplexity (less is better)")
