"""A recipe is a composition written down: inputs, steps, checks, out. `load` reads one, `build` makes its checkpoint, `run` saves and checks it.

    inputs: {base: org/base, code: ./code}
    steps:
      - merge: {method: pcb, base: base, models: [code, docs], lambda: 0.6}
      - quantize: {bits: 4, group_size: 64}
    checks: {texts: {code: code.txt}, limits: {perplexity: 40}}
    out: merged-4bit

Every command of the program is a recipe too, and every output holds the recipe that made it. A file in mergekit's schema is read as well, and one with
blanks (variables, a matrix) is as many recipes as its matrix has combinations: `load_all`.
Paths in a recipe are relative to the recipe's folder; `out` is relative to where you stand.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from .checkpoint import Checkpoint, Deferred, Manifest, SaveOptions, save, steps_of
from .checkpoint.folder import ADAPTER_CONFIG, COMPACT, DELTA_QUANT
from .checkpoint.hub import HubFile
from .checkpoint.inputs import check_target, input_files
from .checkpoint.layout import MANIFEST, computations, plan_save
from .checkpoint.plan import is_copy
from .checkpoint.references import split_reference
from .checkpoint.shards import parse_size
from .checkpoint.stage import partial_of, refuse_leftover
from .checkpoint.upload import Target, Upload, parse_target
from .checks import Checks, Row, Verdict, measure_and_compare
from .errors import CheckFailed, CompressError, OutputError, RecipeError, not_inputs
from .model import adapter_reason
from .provenance import check_digests, job, small_files, sparsity_report
from .safe_yaml import read_all
from .steps import (
    Execution,
    FoldStep,
    MergeStep,
    StepOptions,
    Strict,
    calibrations,
    order_problems,
    parse_step,
    parse_steps,
    schema_problems,
    source_of,
    with_files,
)
from .template import expand
from .trial import Sampled, attempt


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


@dataclass(frozen=True)
class Outcome:
    """What a run wrote and measured, what became of each check, and where on the Hub it is (`published`, with its commit there)."""

    out: Path | Target
    manifest: Manifest
    table: list[Row]
    verdicts: list[Verdict]
    sampled: list[Sampled] = field(default_factory=list)  # how the output goes on with prompts
    searched: list[dict[str, Any]] = field(default_factory=list)  # the record of each search of this run
    published: tuple[Target, str] | None = None
    sparsity: dict[str, Any] | None = None  # the zeros of what was pruned

    @property
    def failures(self) -> list[str]:
        """The checks that were not kept, a sentence each."""
        return failures_of(self.verdicts)

    def raise_failures(self) -> None:
        """CheckFailed where a check was not kept."""
        if self.failures:
            raise CheckFailed("; ".join(self.failures))


def failures_of(verdicts: Sequence[Verdict]) -> list[str]:
    """What is wrong, a sentence for each check that was not kept."""
    return [verdict.sentence for verdict in verdicts if not verdict.kept]


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


@dataclass(frozen=True)
class Built:
    """A recipe put together: its opened inputs, what each step makes, and the result; nothing is computed yet."""

    inputs: dict[str, Checkpoint]
    stages: dict[str, Checkpoint]
    result: Checkpoint


def build(recipe: Recipe, how: Execution | None = None, inputs: dict[str, Checkpoint] | None = None) -> Built:
    """Open the inputs, unless they are open already, and compose the steps.

    Errors: those of opening a checkpoint and of the operations, before any tensor is read.
    """
    how = replace(how or Execution(), folder=recipe.folder)
    if inputs is None:
        inputs = {name: replace(Checkpoint.open(recipe.resolve(source.ref), how.cache), label=source.ref) for name, source in recipe.inputs.items()}
    stages: dict[str, Checkpoint] = {}
    result: Checkpoint | None = None
    for number, step in enumerate(recipe.steps, 1):
        for name, options in step.items():
            stages[f"after step {number}, {name}"] = result = options.build(inputs, result, how)
    return Built(inputs, dict(list(stages.items())[:-1]), result if result is not None else source_of(None, inputs, None, "recipe"))


def with_found(recipe: Recipe, inputs: Mapping[str, Checkpoint], how: Execution) -> Recipe:
    """The recipe with what its steps leave to be found: the option values of searches, the blocks that a fold keeps."""
    from .search.run import search

    how = replace(how, folder=recipe.folder)
    steps: list[dict[str, StepOptions]] = []
    result: Checkpoint | None = None
    for step in recipe.steps:
        for name, options in step.items():
            if isinstance(options, MergeStep) and options.search:
                options = search(options, inputs, recipe.folder, how)
            elif isinstance(options, FoldStep) and options.is_open:
                options = options.found(inputs, result, how)
            steps.append({name: options})
            result = options.build(inputs, result, how)
    return recipe.model_copy(update={"steps": steps})


def run(recipe: Recipe, how: Execution | None = None) -> Outcome:
    """Search where the recipe says so, build, save, check and publish.

    The output stays where a check fails, and nothing is published then; `outcome.failures` tells.

    Errors: RecipeError without an output; CheckFailed where a check keeps what has no other output from the Hub; whatever `build` and `save` refuse.
    """
    how = how or Execution()
    out, target = _target(recipe, how)
    if target is None:
        return _run(recipe, how, out, None)
    with Upload(target, how.private) as upload:
        return _run(recipe, how, out, upload)


def help_with(recipe: Recipe, how: Execution) -> None:
    """Take part in the long computations of a recipe that another process of the same torchrun carries out; write nothing."""
    for computation in computations(build(recipe, how).result):
        computation.run()


def _run(recipe: Recipe, how: Execution, out: Path, upload: Upload | None) -> Outcome:
    from .engines import crew_of

    built = build(recipe, how)
    _check_out(recipe, built.result, out)
    if upload is not None:
        _begin_upload(upload, recipe, built.result, how, out)

    searched: list[dict[str, Any]] = []
    if recipe.is_open:
        check_target(out, how.save.overwrite, built.result)
        if not (how.save.resume or how.save.overwrite):
            refuse_leftover(out.resolve())
        recipe = with_found(recipe, built.inputs, how)
        built = build(recipe, how, built.inputs)  # what was searched on, wherever a branch on the Hub is by now
        searched = [options.searched for step in recipe.steps for options in step.values() if isinstance(options, MergeStep) and options.searched]

    options = replace(_save_options(recipe, how), job=job(recipe, how.device), upload=upload)
    finish = _Finish(recipe, built, options, out)
    with crew_of(recipe, built, how) as crew:
        options = replace(options, crew=crew)
        manifest = save(built.result, out, options, finish.describe, partial(finish.publish, upload) if upload and how.push is None else None)

    table, verdicts, sampled = finish.measurements()

    if upload and how.push and not failures_of(verdicts):
        try:
            finish.publish(upload, out, manifest)
        except OutputError as error:
            raise OutputError(f"{error}; {out} is complete, and `hf upload {upload.target.repo} {out}` sends it") from None
    sparsity = finish.sparsity or sparsity_report(recipe, out)  # of one file, too
    return Outcome(out if upload is None or how.push else upload.target, manifest, table, verdicts, sampled, searched, finish.published, sparsity)


def _begin_upload(upload: Upload, recipe: Recipe, result: Checkpoint, how: Execution, out: Path) -> None:
    """Make the repository; what could not be saved is refused first, so that none is made for it."""
    plan_save(result, out, _save_options(recipe, how))
    if how.push and not how.save.resume:
        check_target(out, how.save.overwrite, result)
    upload.begin(how.save.overwrite, partial_of(out.resolve()) / "files" / MANIFEST if how.save.resume else None)


Measured = tuple[list[Row], list[Verdict], list[Sampled]]


@dataclass
class _Finish:
    """What a run does once the weights are written: `save` calls `describe`, and `publish` where the output goes to the Hub alone."""

    recipe: Recipe
    built: Built
    options: SaveOptions
    out: Path
    measured: Measured | None = None
    unmeasured: CompressError | None = None  # why it could not be measured; told at the end, for hours of work do not go because of it
    published: tuple[Target, str] | None = None
    sparsity: dict[str, Any] | None = None  # of what was pruned

    def describe(self, manifest: Manifest, folder: Path) -> Mapping[str, bytes]:
        """Check the inputs, measure what lies in the folder, and tell of it in the recipe and the card."""
        check_digests(self.recipe, self.built.inputs, manifest)
        try:
            self.measured = self._measure(folder)
        except CompressError as error:
            self.unmeasured = error
        table, verdicts, sampled = self.measured or ([], [], [])
        self.sparsity = sparsity_report(self.recipe, folder)
        return small_files(self.recipe, self.built.inputs, manifest, self.out, self.options.max_shard_size, table, verdicts, sampled, self.sparsity)

    def publish(self, upload: Upload, folder: Path, manifest: Manifest) -> None:
        """Give the repository what lies in the folder, unless a check failed."""
        failures = failures_of(self.measured[1]) if self.measured else []
        if self.unmeasured or failures:
            raise CheckFailed(f"{self.unmeasured or '; '.join(failures)}; nothing was published")
        with self.options.progress.phase("publishing", None):
            digests = {name: facts["sha256"] for name, facts in manifest.outputs.items()}
            self.published = upload.target, upload.commit(folder, digests, MANIFEST)

    def measurements(self) -> Measured:
        """The table, what became of the checks, and samples; measured now where `describe` was not called (one file, or all was written already)."""
        if self.unmeasured:
            raise self.unmeasured
        return self.measured or self._measure(self.out)

    def _measure(self, folder: Path) -> Measured:
        checks = self.recipe.checks
        if not checks.measures:
            return [], [], []
        result = replace(Checkpoint.open(folder), label=str(self.out))
        table, verdicts = measure_and_compare(checks, self.recipe.folder, self.built.inputs, self.built.stages, result, self.options.progress)
        tried, sampled = attempt(folder, checks)
        return table, [*verdicts, *tried], sampled


def plan(recipe: Recipe, how: Execution | None = None) -> dict[str, Any]:
    """What `run` would do, from headers alone: what is read and written, how often, and what memory, disk and network that takes."""
    how = how or Execution()
    out, target = _target(recipe, how)
    result = build(recipe, replace(how, cache=False)).result
    _check_out(recipe, result, out)
    if target is not None:
        with Upload(target) as upload:
            upload.check(how.save.overwrite)
    if target is None or how.push:
        check_target(out, how.save.overwrite, result)
    layout = plan_save(result, out, _save_options(recipe, how))
    blobs = [blob for blobs in input_files(result).values() for blob in blobs]
    cached = sum(blob.size for blob in blobs if isinstance(blob, HubFile)) if how.cache else 0
    copies = sum(len(step.writes) for step in steps_of(result) if is_copy(step) and not isinstance(step.reads[0][0].source, Deferred))
    return {
        "out": str(out if target is None or how.push else target), "files": len(layout.shards),
        "tensors": {"computed": len(result.specs) - copies, "copied": copies},
        "bytes_read": layout.bytes_read, "bytes_measured": layout.bytes_measured, "bytes_written": layout.bytes_written,
        "bytes_hashed": sum(blob.size for blob in blobs if not isinstance(blob, HubFile)) + layout.bytes_written,
        "measurements": len(layout.before) - len(layout.deferred), "computations": len(layout.deferred),
        "memory": layout.memory, "workers": layout.workers, "largest_unit": layout.largest_unit, "peak_memory": layout.peak_memory,
        "from_hub": {"bytes": cached or layout.from_hub[0], "requests": layout.from_hub[1] * (not cached)},
        "cached": cached, "disk_needed": layout.disk_needed, "disk_free": shutil.disk_usage(out.parent).free,
        "notes": list(result.notes),
    }  # fmt: skip


def _target(recipe: Recipe, how: Execution) -> tuple[Path, Target | None]:
    """The output, and where on the Hub it goes: as well (`how.push`), or instead, where the output names it; it is then only made beside that path."""
    named = str(how.out or recipe.out or "")
    if not named:
        raise RecipeError("the recipe names no output; give one with -o, or `out:` in the recipe")
    target = parse_target(named)
    if target is not None and how.push:
        raise RecipeError(f"-o {target} and --push {how.push}: give one of them, or a local folder with -o")
    if target is None and how.push:
        if Path(named).suffix == ".safetensors":
            raise RecipeError(f"--push: a repository is a folder; write to the folder {Path(named).with_suffix('')} with -o")
        return Path(named), parse_target(how.push, bare=True)
    return (Path(named), None) if target is None else (target.folder, target)


def _check_out(recipe: Recipe, result: Checkpoint, out: Path) -> None:
    """Refuse one file for what needs the config.json beside it, and texts for what is no model."""
    if not recipe.steps and DELTA_QUANT in result.files:
        raise RecipeError(f"{adapter_reason(result)}; name the base with --base")
    if {ADAPTER_CONFIG, DELTA_QUANT} & result.files.keys() and (out.suffix == ".safetensors" or recipe.checks.texts):
        folder = out.with_suffix("") if out.suffix == ".safetensors" else out
        raise RecipeError(f"{out}: an adapter is a folder, for the JSON beside its tensors, and texts are measured on models; write to {folder}, without texts")
    if out.suffix != ".safetensors":
        return
    folder = out.with_suffix("")
    if result.config.get("quantization_config"):
        raise RecipeError(
            f"{out}: packed weights need a folder, because its config.json says how they were packed; write to {folder}, or quantize with the format dense"
        )
    if result.config.get("model_type") == COMPACT:
        raise RecipeError(f"{out}: a compact model needs a folder, because its config.json says which blocks share; write to the folder {folder}")
    if recipe.checks.texts or recipe.checks.load or recipe.checks.sample:
        raise RecipeError(f"{out}: a text is measured on a model, which needs its config.json; write to the folder {folder}")


def _save_options(recipe: Recipe, how: Execution) -> SaveOptions:
    return replace(how.save, max_shard_size=parse_size(recipe.max_shard_size)) if recipe.max_shard_size else how.save
