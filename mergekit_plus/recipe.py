"""A recipe is a composition written down: inputs, steps, checks, out. `load` reads one, `build` makes its checkpoint, `run` saves and checks it.

    inputs: {base: org/base, code: ./code}
    steps:
      - merge: {method: pcb, base: base, models: [code, docs], lambda: 0.6}
      - quantize: {bits: 4, group_size: 64}
    checks: {texts: {code: code.txt}, limits: {perplexity: 40}}
    out: merged-4bit

Every command of the program is a recipe too, and every output holds the recipe that made it. A file in mergekit's schema is read as well.
Paths in a recipe are relative to the recipe's folder; `out` is relative to where you stand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator

from .checkpoint import Checkpoint, Manifest, SaveOptions, save, steps_of
from .checkpoint.checkpoint import is_copy
from .checkpoint.save import DEFAULT_SHARD_SIZE, check_target, plan_save
from .checkpoint.shards import parse_size
from .checks import Checks, measure_and_compare
from .errors import CheckFailed, CheckpointError, RecipeError, nearest
from .steps import Execution, MergeStep, StepOptions, Strict, only_input, order_problems, parse_step, parse_steps, schema_problems

RECIPE = "recipe.yaml"


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

    @field_validator("inputs", mode="before")
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
        found += order_problems(self.steps, self.inputs) if of_order else []
        for name in (*self.checks.beside, *([self.checks.against] if self.checks.against else [])):
            if name not in self.inputs:
                found.append(f"checks: '{name}' is not an input.{nearest(name, self.inputs)}")
        found += self.checks.problems(self.folder)
        if of_order and not self.steps and len(self.inputs) != 1:
            found.append("steps: there is nothing to do")
        return found

    def resolve(self, ref: str) -> str:
        """A reference as it is opened: relative to the recipe where something lies there, else as it is (the Hub)."""
        here = self.folder / Path(ref).expanduser()
        return str(here) if here.exists() or ref.startswith((".", "/", "~")) else ref


@dataclass(frozen=True)
class Outcome:
    """What a run wrote and measured; `failures` are the limits that were not kept."""

    out: Path
    manifest: Manifest
    table: list[dict[str, Any]]
    failures: list[str]
    searched: list[dict[str, Any]] = field(default_factory=list)  # the record of each search of this run

    def raise_failures(self) -> None:
        """CheckFailed where a limit was not kept."""
        if self.failures:
            raise CheckFailed("; ".join(self.failures))


def load(path: Path) -> Recipe:
    """Read a recipe, ours or mergekit's.

    Errors: RecipeError with every problem found.
    """
    try:
        parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(parsed, dict):
        raise RecipeError(f"{path} is not a recipe: it must be a table with inputs and steps")
    if "merge_method" in parsed:
        from .mergekit import translate

        return translate(parsed, str(path))
    return check(parsed, path.parent, str(path))


def check(parsed: Mapping[str, Any], folder: Path, name: str) -> Recipe:
    """A recipe from parsed YAML.

    Errors: RecipeError with every problem found.
    """
    steps, found = parse_steps(parsed["steps"]) if isinstance(parsed.get("steps"), list) else (parsed.get("steps", []), [])
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


@dataclass(frozen=True)
class Built:
    """A recipe put together: its opened inputs, what each step makes, and the result; nothing is computed yet."""

    inputs: dict[str, Checkpoint]
    stages: dict[str, Checkpoint]
    result: Checkpoint


def build(recipe: Recipe, how: Execution | None = None) -> Built:
    """Open the inputs and compose the steps.

    Errors: those of opening a checkpoint and of the operations, before any tensor is read.
    """
    how = how or Execution()
    inputs = {name: replace(Checkpoint.open(recipe.resolve(source.ref)), label=source.ref) for name, source in recipe.inputs.items()}
    stages: dict[str, Checkpoint] = {}
    result: Checkpoint | None = None
    for number, step in enumerate(recipe.steps, 1):
        for name, options in step.items():
            stages[f"after step {number}, {name}"] = result = options.build(inputs, result, how)
    return Built(inputs, dict(list(stages.items())[:-1]), result if result is not None else only_input(inputs, None, "recipe"))


def with_found(recipe: Recipe, inputs: Mapping[str, Checkpoint], how: Execution) -> Recipe:
    """The recipe with the option values that its searches find in place of the searches."""
    from .search.run import search

    steps = [
        {name: search(options, inputs, recipe.folder, how) if isinstance(options, MergeStep) and options.search else options for name, options in step.items()}
        for step in recipe.steps
    ]
    return recipe.model_copy(update={"steps": steps})


def run(recipe: Recipe, how: Execution | None = None) -> Outcome:
    """Search where the recipe says so, build, save and check. The output stays where a check fails; `outcome.failures` tells.

    Errors: RecipeError without an output; whatever `build` and `save` refuse.
    """
    how = how or Execution()
    out = _target(recipe, how)
    built = build(recipe, how)
    _check_out(recipe, built.result, out)
    searched: list[dict[str, Any]] = []
    if recipe.searches:
        check_target(out, how.save.overwrite, built.result)
        recipe = with_found(recipe, built.inputs, how)
        built = build(recipe, how)
        searched = [options.searched for step in recipe.steps for options in step.values() if isinstance(options, MergeStep) and options.searched]

    def describe(manifest: Manifest) -> Mapping[str, bytes]:
        _check_digests(recipe, built.inputs, manifest)
        return {RECIPE: resolved(recipe, built.inputs, manifest, out, options.max_shard_size)}

    options = _save_options(recipe, how)
    manifest = save(built.result, out, options, describe)
    if recipe.checks.texts or recipe.checks.limits.model_fields_set:
        table, failures = measure_and_compare(recipe.checks, recipe.folder, built.inputs, built.stages, Checkpoint.open(out), how.save.progress)
        return Outcome(out, manifest, table, failures, searched)
    return Outcome(out, manifest, [], [], searched)


def plan(recipe: Recipe, how: Execution | None = None) -> dict[str, Any]:
    """What `run` would do, from headers alone: what is read and written, and what memory and disk that takes."""
    how = how or Execution()
    out = _target(recipe, how)
    result = build(recipe, how).result
    _check_out(recipe, result, out)
    check_target(out, how.save.overwrite, result)
    layout = plan_save(result, out, _save_options(recipe, how))
    copies = sum(len(step.writes) for step in steps_of(result) if is_copy(step))
    return {
        "out": str(out), "files": len(layout.shards), "tensors": {"computed": len(result.specs) - copies, "copied": copies},
        "bytes_read": layout.bytes_read, "bytes_written": layout.bytes_written, "measurements": len(layout.measurements),
        "memory": layout.memory, "workers": layout.workers, "largest_unit": layout.largest_unit,
        "disk_free": shutil.disk_usage(out.parent).free,
    }  # fmt: skip


def _target(recipe: Recipe, how: Execution) -> Path:
    if how.out is None and recipe.out is None:
        raise RecipeError("the recipe names no output; give one with -o, or `out:` in the recipe")
    return how.out or Path(recipe.out or "")


def _check_out(recipe: Recipe, result: Checkpoint, out: Path) -> None:
    """Refuse one file for what needs the config.json beside it."""
    if out.suffix != ".safetensors":
        return
    folder = out.with_suffix("")
    if result.config.get("quantization_config"):
        raise RecipeError(
            f"{out}: packed weights need a folder, because its config.json says how they were packed; write to {folder}, or quantize with the format dense"
        )
    if recipe.checks.texts:
        raise RecipeError(f"{out}: a text is measured on a model, which needs its config.json; write to the folder {folder}")


def _save_options(recipe: Recipe, how: Execution) -> SaveOptions:
    return replace(how.save, max_shard_size=parse_size(recipe.max_shard_size)) if recipe.max_shard_size else how.save


def resolved(recipe: Recipe, inputs: Mapping[str, Checkpoint], manifest: Manifest, out: Path, shard_size: int = DEFAULT_SHARD_SIZE) -> bytes:
    """The recipe as the output holds it: paths relative to the output, every input with its digests, and the size of shards where it was chosen."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    content["inputs"] = {
        name: {
            "ref": _relative(recipe.resolve(source.ref), out),
            "sha256": {file: facts["sha256"] for file, facts in manifest.inputs.get(inputs[name].label, {}).items()},
        }
        for name, source in recipe.inputs.items()
    }
    content["steps"] = [{name: options.model_dump(mode="json", exclude_none=True) for name, options in step.items()} for step in recipe.steps]
    if shard_size != DEFAULT_SHARD_SIZE:
        content["max_shard_size"] = str(shard_size)
    if "checks" in content and recipe.checks.texts:
        content["checks"]["texts"] = {name: _relative(str(recipe.folder / text), out) for name, text in recipe.checks.texts.items()}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120).encode()


class _Dumper(yaml.SafeDumper):
    """Writes a table of nothing but numbers on one line: the trace of a search has many."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        flat = [number for value in mapping.values() for number in (value if isinstance(value, list) else [value])]
        inline = bool(flat) and all(number is None or isinstance(number, int | float) for number in flat)
        return super().represent_mapping(tag, mapping, inline or flow_style)


def _relative(ref: str, out: Path) -> str:
    return os.path.relpath(os.path.abspath(ref), os.path.realpath(out)) if Path(ref).exists() else ref


def _check_digests(recipe: Recipe, inputs: Mapping[str, Checkpoint], manifest: Manifest) -> None:
    for name, source in recipe.inputs.items():
        found = manifest.inputs.get(inputs[name].label, {})
        for file, digest in source.sha256.items():
            if found.get(file, {}).get("sha256") != digest:
                raise CheckpointError(f"input '{name}': {file} is not the file that the recipe was made with (its SHA-256 differs)")
