"""A recipe is a composition written down: inputs, steps, checks, out. `load` reads one; recipe.py carries it out.

    inputs: {base: org/base, code: ./code}
    steps:
      - merge: {method: pcb, base: base, models: [code, docs], lambda: 0.6}
      - quantize: {bits: 4, group_size: 64}
    checks: {texts: {code: code.txt}, limits: {perplexity: 40}}
    out: merged-4bit

A file in mergekit's schema is read as well, and one with blanks (variables, a matrix) is as many recipes as its matrix has combinations: `load_all`. Paths in
a recipe are relative to the recipe's folder; `out` is relative to where you stand.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from .checkpoint.references import split_reference
from .checkpoint.upload import parse_target
from .checks import Checks
from .errors import RecipeError, not_inputs
from .safe_yaml import read_all
from .steps import (
    FoldStep,
    MergeStep,
    StepOptions,
    Strict,
    calibrations,
    order_problems,
    parse_step,
    parse_steps,
    schema_problems,
    with_files,
)
from .template import expand


class Input(Strict):
    """An input: where it is, and optionally the digests that its files must have."""

    ref: str
    sha256: dict[str, str] = Field(default_factory=dict)


class Recipe(Strict):
    """A whole recipe."""

    inputs: dict[str, Input]
    steps: list[dict[str, StepOptions]] = Field(default_factory=list)
    checks: Checks = Field(default_factory=Checks)
    out: str | None = None
    max_shard_size: str | None = None
    _folder: Path = PrivateAttr(Path())

    @property
    def folder(self) -> Path:
        """What its paths are relative to."""
        return self._folder

    @property
    def searches(self) -> list[MergeStep]:
        """The merges whose options are to be found first."""
        return [options for step in self.steps for options in step.values() if isinstance(options, MergeStep) and options.search]

    @property
    def is_open(self) -> bool:
        """Whether a step leaves something to be found before it can be made."""
        return bool(self.searches) or any(isinstance(options, FoldStep) and options.is_open for step in self.steps for options in step.values())

    @field_validator("inputs", mode="before", json_schema_input_type=dict[str, Input | str])
    @classmethod
    def _short_inputs(cls, value: object) -> object:
        return {name: {"ref": ref} if isinstance(ref, str) else ref for name, ref in value.items()} if isinstance(value, dict) else value

    @field_validator("steps", mode="before")
    @classmethod
    def _named_steps(cls, value: object) -> object:
        return [parse_step(step) for step in value] if isinstance(value, list) else value

    def problems(self, of_order: bool = True) -> list[str]:
        """Everything wrong that the schema does not see; without `of_order` where steps are missing that could not be read."""
        found = [problem for step in self.steps for options in step.values() for problem in options.problems(self.inputs)]
        found += [problem for step in self.searches for problem in step.search_problems(self.folder)]
        found += [f"{name}: {problem}" for name, text in calibrations(self.steps) for problem in text.problems(self.folder)]
        found += order_problems(self.steps, self.inputs) if of_order else []
        named = [*self.checks.beside, *([self.checks.against] if self.checks.against else [])]
        found += [f"checks: {problem}" for problem in not_inputs(named, self.inputs)]
        found += self.checks.problems(self.folder)
        if of_order and not self.steps and len(self.inputs) != 1:
            found.append("steps: there is nothing to do")
        return found

    def resolve(self, ref: str) -> str:
        """A reference as it is opened: relative to the recipe where something lies there, else as it is (the Hub); so is each part of `model+adapter`."""
        return "+".join(self._resolve(part) for part in split_reference(ref, self.folder))

    def _resolve(self, ref: str) -> str:
        here = self.folder / Path(ref).expanduser()
        return str(here) if here.exists() or ref.startswith((".", "/", "~")) else ref


def load(path: Path, lenient: bool = False, given: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe that is one, as `load_all` reads those that are several.

    Errors: RecipeError with every problem found.
    """
    recipes = load_all(path, lenient, given)
    if len(recipes) > 1:
        some = "; ".join([*list(recipes)[:4], *(["..."] if len(recipes) > 4 else [])])
        raise RecipeError(f"{path} is {len(recipes)} recipes ({some}); choose one with --set NAME=VALUE")
    return next(iter(recipes.values()))


def load_all(path: Path, lenient: bool = False, given: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """Read recipes, ours or mergekit's, by the combination of the matrix that each is ("" where there is none).

    lenient: warn of keys that mergekit ignores instead of refusing them. given: values of variables.
    Errors: RecipeError with every problem found.
    """
    documents = [document for document in read_all(path) if document is not None]
    if any(isinstance(document, dict) and "merge_method" in document for document in documents):
        _without_blanks(given, path)
        return {"": _of_mergekit(documents, str(path), lenient)}
    if len(documents) > 1:
        raise RecipeError(f"{path} holds {len(documents)} YAML documents, where one is expected; mergekit's may be several")
    if not documents or not isinstance(documents[0], dict):
        raise RecipeError(f"{path} is not a recipe: it must be a table with inputs and steps")
    if "experts" in documents[0]:
        from .mergekit.moe import moe_recipe

        _without_blanks(given, path)
        return {"": check(moe_recipe(documents[0], str(path)), Path(), str(path))}  # paths relative to where one stands, as with mergekit-moe
    try:
        expanded = expand(documents[0], path.parent, given or {})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return {name: check(document, path.parent, f"{path}{f' ({name})' if name else ''}") for name, document in expanded.items()}


def outs(recipes: Mapping[str, Recipe], out: Path | None) -> dict[str, Path | None]:
    """Where each of these goes: what it says itself, or `out`, with the combination of the matrix after its name.

    Errors: RecipeError where two would go to one place.
    """
    if "" in recipes:
        return {"": out}
    if out is not None:
        if parse_target(str(out)):
            raise RecipeError(f"-o {out}: a recipe with a matrix is several models; name a repository for each in the recipe, as in `out: hf://org/name-$bits`")
        end = ".safetensors" if out.suffix == ".safetensors" else ""
        return {name: out.with_name(re.sub(r"[^\w.]+", "-", f"{out.name.removesuffix(end)}-{name}{end}")) for name in recipes}
    places: dict[str, str] = {}
    for name, recipe in recipes.items():
        if recipe.out in places:
            raise RecipeError(f"out: {places[recipe.out]} and {name} would both be written to {recipe.out}; name what differs in it, as in `out: model-$bits`")
        if recipe.out:
            places[recipe.out] = name
    return dict.fromkeys(recipes)


def _without_blanks(given: Mapping[str, Any] | None, path: Path) -> None:
    if given:
        raise RecipeError(f"{path}: --set {next(iter(given))}: mergekit's YAML has no variables")


def _of_mergekit(documents: list[Any], name: str, lenient: bool) -> Recipe:
    """A file in mergekit's schema; its paths are relative to where one stands."""
    from .mergekit import as_recipe, read

    found = read(documents, lenient)
    for key in found.overlooked:
        warnings.warn(f"{name}: {key.removesuffix('.')}{'' if key.endswith('?') else '.'} It is ignored.", stacklevel=2)
    if found.problems:
        raise RecipeError(f"{name}: {'; '.join(found.problems)}")
    return check(as_recipe(found), Path(), name)


def check(parsed: Mapping[str, Any], folder: Path, name: str) -> Recipe:
    """A recipe from parsed YAML.

    Errors: RecipeError with every problem found.
    """
    steps, found = parsed.get("steps", []), list[str]()
    if isinstance(steps, list):
        written, unread = with_files(steps, folder)
        steps, found = parse_steps(written)
        found = unread + found
    try:
        recipe = Recipe.model_validate({**parsed, "steps": steps})
    except ValidationError as error:
        found = schema_problems(error, Recipe) + found
        inputs = parsed.get("inputs")
        if isinstance(inputs, dict) and isinstance(steps, list):
            found += [problem for step in steps for options in step.values() for problem in options.problems(inputs)]
        raise RecipeError(f"{name}: {'; '.join(found)}") from None
    recipe._folder = folder
    if found := found + recipe.problems(of_order=not found):
        raise RecipeError(f"{name}: {'; '.join(found)}")
    return recipe
