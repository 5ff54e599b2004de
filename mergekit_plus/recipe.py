"""A recipe carried out: `build` makes its checkpoint, `run` saves and checks it, `plan` says what that would take.

    outcome = run(load(Path("recipe.yaml")), Execution(out=Path("merged-4bit")))

Every command of the program is a recipe (recipe_file.py), and every output holds the recipe that made it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Deferred, Manifest, SaveOptions, save, steps_of
from .checkpoint.folder import ADAPTER_CONFIG, COMPACT, DELTA_QUANT
from .checkpoint.hub import HubFile
from .checkpoint.inputs import check_target, input_files
from .checkpoint.layout import MANIFEST, computations, plan_save
from .checkpoint.plan import is_copy
from .checkpoint.shards import parse_size
from .checkpoint.stage import partial_of, refuse_leftover
from .checkpoint.upload import Target, Upload, parse_target
from .checks import Row, Verdict, measure_and_compare
from .errors import CheckFailed, CompressError, OutputError, RecipeError
from .model import adapter_reason
from .provenance import check_digests, job, small_files, sparsity_report
from .recipe_file import Recipe, check, load, load_all, outs
from .steps import Execution, FoldStep, MergeStep, StepOptions, source_of
from .trial import Sampled, attempt

__all__ = [
    "Built", "Outcome", "Recipe", "build", "check", "failures_of", "help_with", "load", "load_all", "outs", "plan", "run", "with_found",
]  # fmt: skip


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
