"""A picture of an allocation: the bits of every layer, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quant.quantized import Scheme

from .compare import check_picture
from .model import layer_of


def draw_bits(groups: Sequence[Sequence[str]], choices: Sequence[Scheme], selection: Sequence[int], path: Path) -> None:
    """A row for each kind of layer, a column for each block, the number of bits in each cell. Errors: OptionError for a picture that cannot be drawn."""
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cells: dict[str, dict[int, int]] = {}
    for group, choice in zip(groups, selection, strict=True):
        stack, block = layer_of(group[0]) or ("", 0)
        kind = group[0].removeprefix(f"{stack}.{block}." if stack else "").removesuffix(".weight")
        if len(group) > 1:
            names = [name.removesuffix(".weight").rpartition(".")[2] for name in group]
            kind = "/".join(dict.fromkeys([kind, *names[1:]]))
        cells.setdefault(kind, {})[block] = choices[choice].bits
    blocks = sorted({block for row in cells.values() for block in row})
    low, high = min(scheme.bits for scheme in choices), max(scheme.bits for scheme in choices)
    figure = Figure(figsize=(2.2 + 0.45 * len(blocks), 1.0 + 0.45 * len(cells)), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    values = [[row.get(block, float("nan")) for block in blocks] for row in cells.values()]
    axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for row, bits_of in enumerate(cells.values()):
        for column, block in enumerate(blocks):
            if block in bits_of:
                light = (bits_of[block] - low) / max(1, high - low) > 0.6
                axes.text(column, row, str(bits_of[block]), ha="center", va="center", color="black" if light else "white", fontsize=9)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "bits"}):  # the same allocation, the same bytes
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
