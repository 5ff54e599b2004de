"""Doors to recipes. Heavy things are imported where they are used."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Overwrite, Writing, app, beside, carried_out, open_model, print_result, settings, writes

if TYPE_CHECKING:
    from mergekit_plus.recipe import Outcome
    from mergekit_plus.results import Ran

SetVariable = Annotated[
    list[str], typer.Option("--set", "-s", metavar="NAME=VALUE", help="value of a variable of the recipe, or of one that its matrix goes through; a,b: a list")
]


@app.command()
@writes()
def run(
    *,
    how: Writing,
    recipe: Annotated[Path, typer.Argument(help="a recipe, ours or mergekit's")],
    set_variable: SetVariable = [],  # noqa: B006
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="write the checks as JUnit XML, a test for each")] = None,
    report: Annotated[bool, typer.Option("--report", help="write a page about each output beside it, <out>-report.html")] = False,
    mergekit_lenient: Annotated[bool, typer.Option("--mergekit-lenient", help="warn of keys that mergekit ignores instead of refusing them")] = False,
) -> None:
    """Carry out a recipe, and check what it makes.

    Each combination of its matrix is carried out; exit code 1 when a check fails.

    `compress run recipe.yaml --junit checks.xml`
    """
    from mergekit_plus.errors import CheckFailed, CompressError
    from mergekit_plus.recipe import load_all, outs
    from mergekit_plus.results import Ran

    recipes = load_all(recipe, mergekit_lenient, settings(set_variable, "--set"))
    places = outs(recipes, how.out)
    runs, told, refused = list[Ran](), list[dict[str, object]](), list[CompressError | CheckFailed]()
    for combination, one in recipes.items():
        name, began = f"{recipe.stem} ({combination})" if combination else recipe.stem, time.monotonic()
        outcome, lines = None, list[str]()
        try:
            facts, lines, outcome = carried_out(one, replace(how, out=places[combination]), None)
        except (CompressError, CheckFailed) as error:  # it keeps no other combination from being carried out
            refused.append(error)
            facts, lines = {"error": str(error)}, [f"failed: {error}"] if combination else []
        if report and outcome is not None:
            lines.append(f"wrote {_page(outcome, time.monotonic() - began)}")
        told.append({"combination": combination, **facts} if combination else facts)
        runs.append(Ran(name, outcome, facts.get("error"), time.monotonic() - began))
        if not how.as_json and (combination or lines):
            print_result({}, [f"{combination}:", *lines, ""] if combination else lines, False)
    if how.as_json and not (refused and len(runs) == 1):
        print_result({"runs": told} if "" not in recipes else told[0], [], True)
    if not how.dry_run:
        _report(runs, junit)
    _raise(refused, runs)


def _page(outcome: Outcome, seconds: float) -> Path:
    """The page about what a run wrote."""
    from mergekit_plus.errors import OptionError
    from mergekit_plus.report import Spent, gather, page

    if not isinstance(outcome.out, Path) or not outcome.out.is_dir():
        raise OptionError(f"--report: a page is written about a local folder, and this run wrote {outcome.out}")
    spent = Spent(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    path = outcome.out.with_name(f"{outcome.out.name}-report.html")
    path.write_text(page(gather(outcome.out, spent)), encoding="utf-8")
    return path


def _report(runs: Sequence[Ran], junit: Path | None) -> None:
    """Write the results where other programs read them; GitHub's runners say in the environment where the summary of a job is."""
    from mergekit_plus.results import junit as as_junit
    from mergekit_plus.results import summary

    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_bytes(as_junit(runs))
    if place := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(place, "a", encoding="utf-8") as file:
            file.write(summary(runs))


def _raise(refused: Sequence[Exception], runs: Sequence[Ran]) -> None:
    """What was refused, or else the checks that were not kept."""
    from mergekit_plus.errors import CheckFailed, CompressError

    mistakes = [error for error in refused if isinstance(error, CompressError)]
    if mistakes:
        raise mistakes[0] if len(mistakes) == 1 else CompressError(f"{len(mistakes)} of {len(runs)} combinations failed: {mistakes[0]}; ...")
    failures = [f"{run.name}: {sentence}" if len(runs) > 1 else sentence for run in runs if run.outcome for sentence in run.outcome.failures]
    if failures or refused:
        raise CheckFailed("; ".join([*map(str, refused), *failures]))


@app.command()
def init(
    models: Annotated[list[str], typer.Argument(help="a model, or several that are to be merged: folders, files or org/name")] = ["."],  # noqa: B006
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model that several were tuned from")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="recipe to write")] = Path("recipe.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Write a recipe to begin with.

    In comments it has what else one may want; beside it goes the schema that editors read.

    `compress init code`

    `compress init code docs --base base --out merge.yaml`
    """
    from mergekit_plus.errors import OptionError, OutputError
    from mergekit_plus.names import distinct
    from mergekit_plus.recipe_schema import as_json
    from mergekit_plus.starter import starter

    if base is not None and len(models) == 1:
        raise OptionError("--base is for a merge: name the models that were tuned from it, as in `compress init code docs --base base`")
    first, *others = models
    named = {ref: name for name, ref in list(distinct(["model", *others, *([base] if base else [])]).items())[1:]}
    opened = [open_model(ref) for ref in (first, *named)]
    places = {name: _seen_from(out.parent, ref) for ref, name in named.items()}
    called = "merged" if others else beside(first, "", "folder").name.rstrip("-")
    text = starter(opened[0], _seen_from(out.parent, first), called, places, named.get(base or ""))
    for path, content in ((out, text), (out.with_name("recipe.schema.json"), as_json())):
        if path.exists() and not overwrite and path.read_text(encoding="utf-8") != content:
            raise OutputError(f"{path} exists already; name another recipe with -o, or replace it with --overwrite")
        path.write_text(content, encoding="utf-8")
    print_result({}, [f"wrote {out}; `compress run {out}` carries it out, `--dry-run` tells first what that takes"], False)


def _seen_from(folder: Path, ref: str) -> str:
    """Where a model is, for a recipe in this folder."""
    return os.path.relpath(ref, folder) if Path(ref).exists() else ref


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    `compress schema > recipe.schema.json`
    """
    from mergekit_plus.recipe_schema import as_json

    print(as_json(), end="")
