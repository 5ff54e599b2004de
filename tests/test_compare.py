"""Recipes and models side by side: one table, one picture, nothing written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checks import Checks
from mergekit_plus.compare import compare, draw
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize

MODELS = Path(__file__).parent / "models"
NAMES = ("code", "docs")
CHECKS = Checks(texts={name: str(MODELS / "text" / f"{name}.val.txt") for name in NAMES}, window=64, windows=4)
PNG, SVG = b"\x89PNG", b"<?xml"


def recipe(folder: Path, merge: str, more: str = "") -> str:
    """A recipe over the models of the repository."""
    inputs = ", ".join(f"{name}: {MODELS / name}" for name in ("base", *NAMES))
    path = folder / "recipe.yaml"
    path.write_text(f"inputs: {{{inputs}}}\nsteps:\n  - merge: {{base: base, models: [code, docs], {merge}}}\n{more}")
    return str(path)


def test_recipes_and_models_are_measured_on_every_text_and_nothing_is_written(tmp_path: Path) -> None:
    path = recipe(tmp_path, "method: task_arithmetic, weight: 0.5", "  - quantize: {bits: 8, group_size: 64}\n")
    merged, base = compare({"merged": path, "base": str(MODELS / "base")}, CHECKS)
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    assert (merged["model"], base["model"], base["bits/weight"]) == ("merged", "base", 16.0)
    assert merged["bits/weight"] < 12
    checkpoint = Checkpoint.open(MODELS / "base")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    for name in NAMES:
        ids = tokenize(tokenizer, Path(CHECKS.texts[name]).read_text())
        assert base[f"ppl {name}"] == pytest.approx(perplexity(model, ids, window=64, limit=4).value)
    assert base["mean log"] == pytest.approx(math.log(base["ppl code"] * base["ppl docs"]) / 2)


def test_a_normalised_loss_is_0_for_the_base_and_1_for_the_expert_on_its_own_text() -> None:
    refs = {name: str(MODELS / name) for name in ("base", "docs", "code")}
    base, docs, code = compare(refs, CHECKS, refs["base"], {"docs": refs["docs"]})
    assert (base["norm docs"], docs["norm docs"]) == (0, 1)
    assert code["norm docs"] == pytest.approx(math.log(base["ppl docs"] / code["ppl docs"]) / math.log(base["ppl docs"] / docs["ppl docs"]))
    assert (code["norm mean"], code["norm worst"]) == (code["norm docs"], code["norm docs"])


def test_a_recipe_with_a_search_is_searched_first(tmp_path: Path) -> None:
    text = MODELS / "text" / "code.val.txt"
    path = recipe(tmp_path, f"method: task_arithmetic, search: {{options: [lambda], texts: {{code: {text}}}, budget: 3, window: 32, windows: 1}}")
    plain = recipe(tmp_path / "..", "method: task_arithmetic")
    found, start = compare({"found": path, "plain": plain}, CHECKS)
    assert found["mean log"] < start["mean log"]


@pytest.mark.parametrize(
    ("base", "experts", "plot", "error"),
    [
        ("base", {}, None, r"both --base MODEL and --expert TEXT=MODEL"),
        (None, {"docs": "docs"}, None, r"both --base MODEL and --expert TEXT=MODEL"),
        ("base", {"dosc": "docs"}, None, r"--expert dosc: there is no text 'dosc'\. Did you mean 'docs'\?"),
        (None, {}, "a.gif", r"--plot a\.gif: the name must end in one of \.svg, \.png, \.pdf"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_work(base: str | None, experts: dict[str, str], plot: str | None, error: str) -> None:
    with pytest.raises(OptionError, match=error):
        compare({"x": "nowhere"}, CHECKS, base, experts, Path(plot) if plot else None)


def test_no_text_a_missing_text_and_a_poor_expert_are_refused() -> None:
    with pytest.raises(OptionError, match="compare: it needs a text; give one with --text NAME=FILE"):
        compare({"x": str(MODELS / "base")}, Checks())
    with pytest.raises(OptionError, match="the text a is not at nowhere.txt"):
        compare({"x": str(MODELS / "base")}, Checks(texts={"a": "nowhere.txt"}))
    with pytest.raises(CheckpointError, match=r"on the text docs the expert .*/code is no better than the base"):
        compare({"x": str(MODELS / "base")}, CHECKS, str(MODELS / "base"), {"docs": str(MODELS / "code")})


def row(name: str, *values: float) -> dict[str, Any]:
    logs = [math.log(value) for value in values]
    return {"model": name, "MB": 1.0, "bits/weight": 16.0, **{f"ppl t{i}": value for i, value in enumerate(values)}, "mean log": sum(logs) / len(logs)}


@pytest.mark.parametrize(("suffix", "magic"), [(".png", PNG), (".svg", SVG)])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_a_picture_is_drawn_of_any_number_of_rows(suffix: str, magic: bytes, count: int, tmp_path: Path) -> None:
    rows = [row(f"recipe {index}", 10 + index, 30 - index) for index in range(count)]
    draw(rows, ["t0", "t1"], tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(magic)
    normalised = [{**each, "norm t0": 0.3, "norm t1": -0.1, "norm mean": 0.1, "norm worst": -0.1} for each in rows]
    draw(normalised, ["t0", "t1"], tmp_path / f"b{suffix}")
    content = (tmp_path / f"b{suffix}").read_bytes()
    assert content.startswith(magic)


def test_the_same_rows_make_the_same_picture(tmp_path: Path) -> None:
    rows = [row("a", 10, 20), row("b", 12, 15)]
    for name in ("1.svg", "2.svg"):
        draw(rows, ["t0", "t1"], tmp_path / name)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_without_matplotlib_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"--plot needs matplotlib: pip install 'mergekit-plus\[plot\]'"):
        compare({"x": "nowhere"}, CHECKS, plot=tmp_path / "a.png")
