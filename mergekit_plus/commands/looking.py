"""Doors to what looks at checkpoints and measures them. Heavy things are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_plus.names import distinct

from .common import Json, Model, Texts, app, named, open_model, print_result

Windows = Annotated[int | None, typer.Option("--windows", min=1, help="use only so many windows of each text")]


@app.command()
def inspect(
    model: Model = ".",
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, from its headers alone.

    `compress inspect merged-4bit`
    """
    from mergekit_plus.inspection import inspect as look
    from mergekit_plus.show import inspection_lines

    facts = look(open_model(model), tensors)
    print_result(facts, inspection_lines(facts), as_json)


@app.command()
def diff(a: Model, b: Model, as_json: Json = False) -> None:
    """Compare two checkpoints tensor by tensor.

    Exit code 1 when they differ.

    `compress diff base code`
    """
    from dataclasses import asdict

    from mergekit_plus.diff import diff as compare

    found = compare(open_model(a), open_model(b))
    text = [f"only in {label}: {name}" for label, names in ((a, found.only_a), (b, found.only_b)) for name in names]
    text += [f"{name}: other shape or dtype" for name in found.unlike]
    text += [f"{t.name}: {t.changed:.2%} changed, largest {t.max_abs:.3g}, relative {t.relative:.3g}" for t in found.tensors if t.changed]
    text.append("the same" if found.same else f"{sum(t.changed > 0 for t in found.tensors)} of {len(found.tensors)} common tensors differ in value")
    print_result({**asdict(found), "same": found.same}, text, as_json)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="an output: its folder, or its .safetensors file")],
    inputs: Annotated[bool, typer.Option("--inputs", help="check the files that it was made of too, where they were then")] = False,
    as_json: Json = False,
) -> None:
    """Compare an output with its manifest.

    Packed weights are compared with config.json too.

    Exit code 1 when a file is not what was written, or would be loaded wrongly.

    `compress verify merged-4bit --inputs`
    """
    from dataclasses import asdict

    from mergekit_plus.progress import on
    from mergekit_plus.show import verification_lines
    from mergekit_plus.verify import verify as check

    facts = asdict(check(out, inputs, on()))
    print_result(facts, verification_lines(facts), as_json)
    if facts["problems"] or facts["wrong"]:
        raise typer.Exit(1)


@app.command()
def eval(
    model: Model,
    text: Annotated[list[Path], typer.Option("--text", "-t", help="text to measure on; may be repeated")],
    against: Annotated[str | None, typer.Option("--against", help="reference model for KL and top-1 agreement")] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="tokens in a window; windows do not overlap")] = 256,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="use only so many windows of each text")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, divergence from a reference, and size.

    `compress eval merged-4bit --text code.txt --against merged`
    """
    from mergekit_plus.checks import Checks, measure
    from mergekit_plus.progress import on
    from mergekit_plus.show import table

    names = distinct([str(path) for path in text])
    checks = Checks(texts=names, window=window, windows=windows)
    reference = open_model(against) if against else None
    rows = ([measure(reference, checks, Path(), on())] if reference else []) + [measure(open_model(model), checks, Path(), on(), reference)]
    print_result({"rows": rows}, table(rows), as_json)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="recipes (.yaml), and models")],
    text: Texts = [],  # noqa: B006
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model whose normalised loss is 0, with --expert")] = None,
    expert: Annotated[list[str], typer.Option("--expert", metavar="TEXT=MODEL", help="the model whose normalised loss on its own text is 1")] = [],  # noqa: B006
    window: Annotated[int, typer.Option("--window", min=2, help="tokens in a window; windows do not overlap")] = 256,
    windows: Windows = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="picture to draw: .svg, .png or .pdf (needs matplotlib)")] = None,
    as_json: Json = False,
) -> None:
    """Measure recipes and models side by side, on several texts.

    What a recipe makes is computed as it is measured; nothing is written but the picture.

    `compress compare recipe.yaml base code --text code.txt --text docs.txt`
    """
    from mergekit_plus.checks import Checks
    from mergekit_plus.compare import compare as measure_all
    from mergekit_plus.compare import draw
    from mergekit_plus.progress import on
    from mergekit_plus.show import comparison_lines

    checks = Checks(texts=named(text), window=window, windows=windows)
    rows = measure_all(distinct(models), checks, base, named(expert), plot, on())
    if plot is not None:
        draw(rows, list(checks.texts), plot)
    print_result({"rows": rows}, comparison_lines(rows), as_json)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="one method, with its options")] = None, as_json: Json = False) -> None:
    """List methods with their options.

    Merge methods, quantizers, pruners, and variants of retraining.

    `compress methods ties`
    """
    from mergekit_plus.listing import list_methods
    from mergekit_plus.show import method_lines

    facts = list_methods(name)
    print_result(facts, method_lines(facts), as_json)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")],
    to: Annotated[Path | None, typer.Option("--out", "-o", help="page to write (default: <folder>-report.html)")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="write each picture too, as .svg and .png")] = None,
    sensitivities: Annotated[Path | None, typer.Option("--sensitivities", metavar="FILE", help="of `compress allocate`: for its frontier")] = None,
) -> None:
    """Write a page about an output, with pictures.

    One file of HTML; the weights of the output and of its inputs are read once.

    `compress report merged-4bit`
    """
    from mergekit_plus.progress import on
    from mergekit_plus.report import gather, page
    from mergekit_plus.report.plots import save

    facts = gather(out, sensitivities=sensitivities, progress=on())
    written = [to or Path(f"{facts.name}-report.html")]
    written[0].write_text(page(facts), encoding="utf-8")
    written += save(facts, plots) if plots else []
    print_result({}, [f"wrote {', '.join(map(str, written))}"], False)
