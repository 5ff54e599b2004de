"""A report as one HTML file: nothing is loaded from anywhere, no script runs, light and dark as the reader has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..show import size
from .facts import Facts
from .plots import as_svg, plots

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f5f6f8; --ink: #1a1c1f; --faint: #6d737d; --line: #dfe2e7; --accent: #3465c4; --good: #1f7a4d;
  --bad: #b3261e; --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1d2026; --ink: #e8eaee; --faint: #969daa; --line: #31353d; --accent: #7aa2f0;
  --good: #6fce9f; --bad: #f2918a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p.lead { margin: .2rem 0 1.4rem; color: var(--faint); } p.note { color: var(--faint); font-size: .88rem; margin: .3rem 0 .8rem; max-width: 46rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; } .tile b { display: block; font-size: 1.45rem; font-weight: 600; }
.tile span { color: var(--faint); font-size: .84rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; }
th:first-child, td:first-child { text-align: left; } td.wide { white-space: normal; overflow-wrap: anywhere; text-align: left; }
tr.last td { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 0 1.6rem; }
@media (max-width: 32rem) { .figures { display: block; } }
svg { max-width: 100%; height: auto; } figure { margin: .6rem 0 1.2rem; } figcaption { color: var(--faint); font-size: .88rem; margin-bottom: .2rem; }
pre { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; overflow-x: auto; font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
"""
CAPTIONS = {
    "bits": "Bits that a weight takes, scales and all",
    "zeros": "Share of zeros",
    "error": "How far weights are from {reference}: the norm of the difference, relative",
    "sensitivity": "What each group of layers costs where it alone has the fewest bits",
    "frontier": "The least loss for each number of bits, as the allocator predicts it",
}


def page(facts: Facts) -> str:
    """The report as HTML. Everything that comes from files is escaped. Errors: OptionError without matplotlib."""
    drawn = {name: as_svg(figure) for name, figure in plots(facts).items()}
    made = ", then ".join(facts.operations) or "a copy"
    body = [
        f"<h1>{escape(facts.name)}</h1>",
        f'<p class="lead">{escape(made)}, of {escape(", ".join(name for name, _, _ in facts.inputs) or "inputs that are not there any more")}</p>',
        f'<div class="tiles">{"".join(_tiles(facts))}</div>',
        *_section("Checks", _checks(facts)),
        *_section("Measured", _measured(facts, drawn)),
        *_section("Size", [_figure(drawn["sizes"], "Bytes of each input, after each step, and of the output as it lies on the disk")]),
        *_section("Layers", _figures([(drawn[name], CAPTIONS[name].format(reference=facts.reference)) for name in facts.grids])),
        *_section("Sensitivity", _figures([(drawn[name], CAPTIONS[name]) for name in ("sensitivity", "frontier") if name in drawn])),
        *_section("What the merged models changed", _merged(facts)),
        *_section("Samples", [f"<pre>{escape(one['prompt'])}<b>{escape(one['text'])}</b></pre>" for one in facts.sampled]),
        *_section("Files", _files(facts)),
        *_section("Notes", [f'<p class="note">{escape(note)}</p>' for note in facts.notes]),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(facts.name)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{chr(10).join(body)}\n</main></body></html>\n'


def _tiles(facts: Facts) -> Iterable[str]:
    """What one wants to know first."""
    _, out = facts.sizes[-1]
    models = [nbytes for _, _, nbytes in facts.inputs]
    yield _tile(size(out), f"{100 * out / max(models):.0f} % of its largest input" if models else "on the disk")
    last = facts.table[-1] if facts.table else {}
    if "bits/weight" in last:
        yield _tile(f"{last['bits/weight']:.2f}", "bits a weight")
    for head, value in last.items():
        if head.startswith("ppl "):
            before = next((row[head] for row in reversed(facts.table[:-1]) if head in row), None)
            yield _tile(f"{value:.2f}", f"perplexity on {head[4:]}" + (f", {100 * (value / before - 1):+.1f} %" if before else ""))
    if facts.checks:
        kept = sum(bool(check["kept"]) for check in facts.checks)
        yield _tile(f"{kept} of {len(facts.checks)}", "checks kept")
    if facts.spent:
        yield _tile(_time(facts.spent.seconds), "from start to end")
        yield _tile(size(facts.spent.peak_memory), "memory at most, file pages too")


def _checks(facts: Facts) -> list[str]:
    verdict = {True: '<span class="good">kept</span>', False: '<span class="bad">not kept</span>'}
    rows = [{"check": check["check"], "found": check["found"], "": verdict[bool(check["kept"])]} for check in facts.checks]
    return [_table(rows, raw=("",))] if rows else []


def _measured(facts: Facts, drawn: Mapping[str, str]) -> list[str]:
    if not facts.table:
        return []
    pictures = [(svg, f"{name.capitalize()}; less is better") for name, svg in drawn.items() if name.startswith("perplexity ")]
    return [_table(facts.table, last=True), *_figures(pictures)]


def _merged(facts: Facts) -> list[str]:
    if not facts.overlaps:
        return []
    rows = [
        {"models": f"{one.first}, {one.second}", "cosine": one.cosine, "shared": f"{one.shared:.0%}", "in opposite directions": f"{one.conflict:.0%}"}
        for one in facts.overlaps
    ]
    note = (
        "Shared: of the fifth of each weight that one model changed most, the part that is in the other's fifth (20 % by chance); of that part, what goes in "
        "opposite directions (50 % by chance)."
    )
    return [_table(rows), f'<p class="note">{note}</p>']


def _files(facts: Facts) -> list[str]:
    rows = [{"file": name, "size": size(file["bytes"]), "SHA-256": file["sha256"][:16]} for name, file in facts.outputs.items()]
    inputs = [{"input": name, "from": ref, "size": size(nbytes)} for name, ref, nbytes in facts.inputs]
    return [
        *([_table(inputs)] if inputs else []), f"<details><summary>{len(rows)} files were written</summary>{_table(rows)}</details>",
        f"<details open><summary>the recipe that makes it again</summary><pre>{escape(facts.recipe)}</pre></details>",
    ]  # fmt: skip


def _section(title: str, content: Sequence[str]) -> list[str]:
    """A heading and what stands under it; nothing where there is nothing."""
    return [f"<h2>{escape(title)}</h2>", *content] if content else []


def _tile(value: str, about: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(about)}</span></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _figures(pictures: Sequence[tuple[str, str]]) -> list[str]:
    """Pictures with their captions, side by side where there is room."""
    return [f'<div class="figures">{"".join(_figure(*picture) for picture in pictures)}</div>'] if pictures else []


def _table(rows: Sequence[Mapping[str, Any]], raw: Sequence[str] = (), last: bool = False) -> str:
    """Rows under the headings that are their keys; the last one stands out where it is the output. raw: columns that are HTML already."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [
        "".join(f"<td>{row.get(head, '') if head in raw else escape(_cell(row.get(head)))}</td>" for head in heads)
        for row in rows
    ]  # fmt: skip
    lines = [f'<tr{" class=last" if last and place == len(cells) - 1 else ""}>{line}</tr>' for place, line in enumerate(cells)]
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{escape(head)}</th>" for head in heads)}</tr>{"".join(lines)}</table></div>'


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
