"""The door to recipes. Heavy things are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Writing, app, carry_out, writes


@app.command()
@writes()
def run(
    *,
    how: Writing,
    recipe: Annotated[Path, typer.Argument(help="a recipe, ours or mergekit's")],
    mergekit_lenient: Annotated[bool, typer.Option("--mergekit-lenient", help="warn of keys that mergekit ignores instead of refusing them")] = False,
) -> None:
    """Carry out a YAML recipe; exit code 1 when a check of it fails."""
    from mergekit_plus.recipe import load

    carry_out(load(recipe, mergekit_lenient), how)
