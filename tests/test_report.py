"""The page about an output: what it tells is what is there, nothing is loaded from elsewhere, and text stays text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
from mergekit_plus.recipe import check, run
from mergekit_plus.report import Facts, Spent, gather, page
from mergekit_plus.report.overlap import overlaps
from mergekit_plus.report.plots import as_svg, bars, save
from mergekit_plus.steps import Execution
from quant.plan import dequantize
from quant.quantized import Scheme
from quant.sensitivity import Sensitivities

MODELS = Path(__file__).parent / "models"
TEXT = MODELS / "text" / "code.test.txt"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge, pruned and quantized, with checks of which one is not kept."""
    parsed = {
        "inputs": {name: str(MODELS / name) for name in ("base", "code", "docs")},
        "steps": [
            {"merge": {"method": "ties", "base": "base", "models": ["code", "docs"], "density": 0.5}}, {"prune": {"sparsity": 0.5}},
            {"quantize": {"bits": 4, "group_size": 32}},
        ],
        "checks": {"texts": {"code": str(TEXT)}, "windows": 1, "beside": ["code"], "limits": {"perplexity": 1, "bits_per_weight": 7}, "sample": "import <b>"},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("report") / "small"
    run(check(parsed, folder.parent, "test"), Execution(out=folder))
    return folder


@pytest.fixture(scope="module")
def facts(out: Path) -> Facts:
    return gather(out, Spent(100, 2**30))


def test_sizes_are_those_of_inputs_steps_and_the_output(facts: Facts, out: Path) -> None:
    names = [name for name, _ in facts.sizes]
    assert names == ["base", "code", "docs", "after step 1, merge", "after step 2, prune", "output"]
    assert [size for _, size in facts.sizes][:5] == [2_886_912] * 5
    assert facts.sizes[-1][1] == Checkpoint.open(out).nbytes
    assert facts.operations == ("merge", "prune", "quantize")


def test_each_layer_is_told_of_as_it_is(facts: Facts, out: Path) -> None:
    written = dequantize(Checkpoint.open(out))
    stage = run_of(out)
    name = "model.layers.2.mlp.up_proj.weight"
    ours, reference = written.read(name).double(), stage.read(name).double()
    assert facts.grids["error"]["mlp.up_proj"][2] == pytest.approx(float((ours - reference).norm() / reference.norm()))
    assert facts.grids["zeros"]["mlp.up_proj"][2] == float((ours == 0).sum()) / ours.numel()
    weight = out_bytes(out, "model.layers.2.mlp.up_proj.")
    assert facts.grids["bits"]["mlp.up_proj"][2] == 8 * weight / ours.numel()
    assert facts.reference == "step 1, merge"
    assert {kind: sorted(row) for kind, row in facts.grids["bits"].items()}["self_attn.q_proj"] == list(range(6))


def run_of(out: Path) -> Checkpoint:
    """What the merge made."""
    from mergekit_plus.recipe import build, load

    return build(load(out / "recipe.yaml")).stages["after step 1, merge"]


def out_bytes(out: Path, prefix: str) -> int:
    return sum(spec.nbytes for name, spec in Checkpoint.open(out).specs.items() if name.startswith(prefix))


def test_what_two_models_changed_is_compared_element_by_element() -> None:
    generator = torch.Generator().manual_seed(0)
    start, a, b = (torch.randn(8, 10, generator=generator) for _ in range(3))
    base, first, second = (Checkpoint.from_tensors({"w.weight": start + change}, "m") for change in (torch.zeros(8, 10), a, b))
    (found,) = overlaps(base, {"a": first, "b": second})
    a, b = (start + a).sub(start).double(), (start + b).sub(start).double()  # as float32 has them
    tops = [change.abs() >= change.abs().flatten().sort(descending=True).values[15] for change in (a, b)]  # a fifth of 80
    both = tops[0] & tops[1]
    assert found.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-5)
    assert found.shared == int(both.sum()) / 16
    assert found.conflict == int((both & (a * b < 0)).sum()) / int(both.sum())


def test_a_model_shares_all_with_itself_and_nothing_with_its_opposite() -> None:
    start, change = torch.ones(4, 5), torch.arange(20.0).reshape(4, 5)
    base, more, less = (Checkpoint.from_tensors({"w.weight": start + factor * change}, "m") for factor in (0, 1, -1))
    same, opposite, _ = overlaps(base, {"a": more, "b": more, "c": less})
    assert (same.cosine, same.shared, same.conflict) == (pytest.approx(1), 1, 0)
    assert (opposite.cosine, opposite.shared, opposite.conflict) == (pytest.approx(-1), 1, 1)
    (nothing,) = overlaps(base, {"a": base, "b": more})
    assert (nothing.cosine, nothing.shared, nothing.conflict) == (0, 0, 0)


def test_sensitivities_give_a_frontier(out: Path, tmp_path: Path) -> None:
    groups = tuple((f"model.layers.{block}.mlp.up_proj.weight",) for block in range(2))
    table = Sensitivities(groups, (Scheme(2, 32), Scheme(4, 32)), ((0.5, 0.1), (3.0, 0.2)), ((0.0, 0.0),) * 2, 0.25, None, {"sensitivity": "kl"})
    table.write(tmp_path / "table.json")
    facts = gather(out, sensitivities=tmp_path / "table.json")
    assert facts.frontier[0][1] == pytest.approx(0.25 + 0.5 + 3.0)
    assert facts.frontier[-1][1] == pytest.approx(0.25 + 0.1 + 0.2)
    assert any(loss == pytest.approx(0.25 + 0.5 + 0.2) for _, loss in facts.frontier)  # the second group first, which loses most
    assert [loss for _, loss in facts.frontier] == sorted((loss for _, loss in facts.frontier), reverse=True)
    assert facts.sensitivity == {"mlp.up_proj": {0: pytest.approx(0.4), 1: pytest.approx(2.8)}}
    assert "The least loss for each number of bits" in page(facts)


# ---- the page ----


class Tags(HTMLParser):
    """Every tag with its attributes; whether all that are opened are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(facts: Facts) -> str:
    return page(facts)


def test_the_page_is_whole_and_loads_nothing(html: str) -> None:
    found = Tags(html)
    assert found.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in html


def test_the_page_says_what_there_is_to_say(html: str) -> None:
    text = Tags(html).text
    tiles = ("2 of 3", "1.07 GB", "2 min")
    for said in (*tiles, "perplexity on code", "not kept", "code, docs", "Share of zeros", "How far weights are from step 1, merge"):
        assert said in text
    assert "import <b>" in text  # a prompt is text, not markup
    assert "<b>import" not in html


def test_names_out_of_files_are_text(facts: Facts) -> None:
    from dataclasses import replace

    hostile = '"><script>alert(1)</script>'
    html = page(replace(facts, name=hostile, notes=(hostile,), inputs=((hostile, hostile, 3),), table=({"model": hostile, f"ppl {hostile}": 3.0},)))
    assert "<script" not in html
    assert Tags(html).open == []


def test_pictures_take_the_colours_of_the_page_and_are_the_same_each_time() -> None:
    first, second = (as_svg(bars(["a", "b<c"], [1.0, 2.0], "MB", "{:.1f}")) for _ in range(2))
    assert first == second
    ElementTree.fromstring(first)
    assert {"var(--ink)", "var(--faint)", "var(--accent)"} <= {f"var(--{name})" for name in ("ink", "faint", "accent") if f"var(--{name})" in first}


def test_pictures_are_written_as_files_too(facts: Facts, tmp_path: Path) -> None:
    names = sorted(path.name for path in save(facts, tmp_path))
    stems = ["bits", "error", "perplexity-code", "sizes", "zeros"]
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("svg", "png"))
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


# ---- outputs that are not all there ----


def test_without_its_inputs_the_output_alone_is_told_of(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "elsewhere" / "deeper" / "small")  # the recipe's paths lead nowhere from there
    facts = gather(tmp_path / "elsewhere" / "deeper" / "small")
    assert [name for name, _ in facts.sizes] == ["output"]
    assert set(facts.grids) == {"bits", "zeros"}
    assert facts.notes[-1].startswith("sizes on the way, errors and overlaps are not told: ")
    assert "inputs that are not there any more" in page(facts)


def test_what_is_no_output_is_refused() -> None:
    with pytest.raises(CheckpointError, match="code has no manifest.json: a report is of a folder that `compress` wrote"):
        gather(MODELS / "code")


def test_the_program_writes_the_page_after_a_run_and_later(tmp_path: Path) -> None:
    recipe = {"inputs": {"m": str(MODELS / "code")}, "steps": [{"quantize": {"bits": 4, "group_size": 32}}], "checks": {"limits": {"bits_per_weight": 7}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))

    def compress(*arguments: str) -> Iterator[str]:
        done = subprocess.run([sys.executable, "-m", "mergekit_plus", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return iter(done.stdout.splitlines())

    assert "wrote out-report.html" in compress("run", "recipe.yaml", "-o", "out", "--report")
    assert "from start to end" in (tmp_path / "out-report.html").read_text()
    assert list(compress("report", "out", "-o", "again.html")) == ["wrote again.html"]
    assert "1 of 1" in (tmp_path / "again.html").read_text()
