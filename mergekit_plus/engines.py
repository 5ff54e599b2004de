"""Who computes the units of a save: the threads of this process, or a Ray cluster, to which a recipe goes as what it is: text and headers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from .checkpoint import Checkpoint, SaveOptions
from .checkpoint.crew import Crew
from .errors import OptionError
from .recipe import Built, Recipe, build
from .steps import Execution


def crew_of(recipe: Recipe, built: Built, how: Execution) -> AbstractContextManager[Crew | None]:
    """The crew that carries out a recipe of which nothing is left to be found; none where this process does.

    Errors: OptionError where it cannot be had.
    """
    if how.engine == "threads":
        return nullcontext()
    from .checkpoint.on_ray import OnRay

    if how.device not in ("cpu", "cuda"):
        raise OptionError(f"--device {how.device}: Ray gives each task a GPU of its own; write --device cuda")
    moved = recipe.model_copy()
    moved._folder = recipe.folder.absolute()
    places = {name: built.inputs[name].pinned or moved.resolve(source.ref) for name, source in recipe.inputs.items()}
    there = Execution(SaveOptions(allow_nonfinite=how.save.allow_nonfinite), how.device, cache=how.cache)
    return OnRay(partial(remade, moved, places, there), how.ray_address, how.save.workers, how.device == "cuda")


def remade(recipe: Recipe, places: Mapping[str, str], how: Execution) -> Checkpoint:
    """The result of a recipe in another process, its inputs opened where they lie and called what they are called there."""
    inputs = {name: replace(Checkpoint.open(places[name], how.cache), label=source.ref) for name, source in recipe.inputs.items()}
    return build(recipe, how, inputs).result
