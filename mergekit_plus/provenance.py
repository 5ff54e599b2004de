"""What an output holds of how it was made: the recipe that makes it again, with the digests of its inputs, and the model card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .calibration.options import CalibrationOptions
from .card import CARD, card
from .checkpoint import Checkpoint, Manifest
from .checkpoint.hub import parse_reference
from .checkpoint.layout import DEFAULT_SHARD_SIZE
from .checkpoint.references import split_reference
from .checkpoint.upload import parse_target
from .checks import Verdict
from .errors import CheckpointError, CompressError
from .steps import TEXT_KEYS, PruneStep, calibrations

if TYPE_CHECKING:
    from .recipe_file import Recipe

RECIPE = "recipe.yaml"
SPARSITY = "sparsity.json"
RESULTS = "results.json"


def small_files(
    recipe: Recipe,
    inputs: Mapping[str, Checkpoint],
    manifest: Manifest,
    out: Path,
    shard_size: int,
    table: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    sampled: Sequence[Mapping[str, str]],
    sparsity: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The recipe and the card of an output; `table` is what was measured, `verdicts` what became of checks, `sampled` how it goes on with prompts, `sparsity`
    the report of its zeros."""
    text = _resolved(recipe, inputs, manifest, out, shard_size)
    refs = [inputs[name].pinned or source.ref for name, source in recipe.inputs.items()]
    models = [there.repo for model in inputs.values() for part in model.pinned.split("+") if (there := parse_reference(part))]
    files = {RECIPE: text, CARD: card(refs, models, _plain_steps(recipe, out), text.decode(), table, sparsity, sampled)}
    if table:
        checks = [{"check": verdict.what, "kept": verdict.kept, "found": verdict.found} for verdict in verdicts]
        measured = [*table[:-1], {**table[-1], "model": "output"}]  # wherever it is
        files[RESULTS] = _json({"measured": measured, "checks": checks, "sampled": sampled})
    return files if sparsity is None else {**files, SPARSITY: _json(sparsity)}


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def sparsity_report(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """What was asked of the last pruning step of a recipe, and the zeros that its output holds; None where nothing was pruned, or the output cannot be
    read as weights."""
    asked = next((options for step in reversed(recipe.steps) for options in step.values() if isinstance(options, PruneStep)), None)
    if asked is None or asked.structured is not None:
        return None
    from prune.plan import PruneOptions
    from prune.report import sparsity_facts, zeros_of
    from quant.plan import dequantize, is_packed

    try:
        written = Checkpoint.open(out)
        zeros = zeros_of(dequantize(written) if is_packed(written) else written, PruneOptions(tuple(asked.exclude)))
    except CompressError:
        return None
    return sparsity_facts(asked.asked, zeros)



def check_digests(recipe: Recipe, inputs: Mapping[str, Checkpoint], manifest: Manifest) -> None:
    """CheckpointError where an input is not what the recipe was made with."""
    for name, source in recipe.inputs.items():
        found = _digests(recipe.resolve(source.ref), inputs[name], manifest)
        for file, digest in source.sha256.items():
            if file not in found and file in inputs[name].files:  # on the Hub, and nobody had to read it
                found[file] = hashlib.sha256(inputs[name].file(file)).hexdigest()
            if found.get(file) != digest:
                raise CheckpointError(f"input '{name}': {file} is not the file that the recipe was made with (its SHA-256 differs)")


def job(recipe: Recipe, device: str) -> str:
    """What the bytes of the output follow from, beside the contents of the inputs: the same text for the same work, wherever it is written to."""
    refs = {name: recipe.resolve(source.ref) for name, source in recipe.inputs.items()}
    content = {
        "inputs": {name: os.path.abspath(ref) if Path(ref).exists() else ref for name, ref in refs.items()},
        "steps": [{name: options.model_dump(mode="json") for name, options in step.items()} for step in recipe.steps],
        "texts": [text.placed(recipe.folder).digests() for _, text in calibrations(recipe.steps)],
        "device": device,
    }
    return json.dumps(content, sort_keys=True)


def _resolved(recipe: Recipe, inputs: Mapping[str, Checkpoint], manifest: Manifest, out: Path, shard_size: int) -> bytes:
    """The recipe as the output holds it: paths relative to the output, every input with its digests, and the size of shards where it was chosen.

    A repository that it went to is left out: whoever runs it again has another.
    """
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    if parse_target(content.get("out", "")):
        del content["out"]
    content["inputs"] = {
        name: {
            "ref": inputs[name].pinned or _relative(recipe.resolve(source.ref), out),
            "sha256": _digests(recipe.resolve(source.ref), inputs[name], manifest),
        }
        for name, source in recipe.inputs.items()
    }
    content["steps"] = _plain_steps(recipe, out)
    if shard_size != DEFAULT_SHARD_SIZE:
        content["max_shard_size"] = str(shard_size)
    if "checks" in content and recipe.checks.texts:
        content["checks"]["texts"] = {name: _relative(str(recipe.folder / text), out) for name, text in recipe.checks.texts.items()}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120).encode()


class _Dumper(yaml.SafeDumper):
    """Writes a table of nothing but numbers on one line, for the trace of a search has many; and the scheme of a group of layers, for there are as many."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        flat = [number for value in mapping.values() for number in (value if isinstance(value, list) else [value])]
        inline = bool(flat) and all(number is None or isinstance(number, int | float) for number in flat)
        return super().represent_mapping(tag, mapping, inline or "modules" in mapping or flow_style)


def _plain_steps(recipe: Recipe, out: Path) -> list[dict[str, dict[str, Any]]]:
    steps = [{name: options.model_dump(mode="json", exclude_none=True) for name, options in step.items()} for step in recipe.steps]
    for step in steps:
        for options in step.values():
            texts = [key for key in TEXT_KEYS if isinstance(options, dict) and isinstance(options.get(key), dict)]  # mergekit's documents are a list
            for key in texts:
                options[key] = CalibrationOptions.model_validate(options[key]).placed(recipe.folder).provenance(out)
    return steps


def _relative(ref: str, out: Path) -> str:
    if len(parts := split_reference(ref)) > 1:
        return "+".join(_relative(part, out) for part in parts)
    return os.path.relpath(os.path.abspath(ref), os.path.realpath(out)) if Path(ref).exists() else ref


def _digests(ref: str, opened: Checkpoint, manifest: Manifest) -> dict[str, str]:
    """The digest of each file of an input; those of `model+adapter` have the number of their part before the name."""
    parts = split_reference(opened.pinned or ref)
    own = next((label for label in (opened.ref, ref) if label in manifest.inputs), opened.ref)  # what is expanded from a file goes by the file's reference
    labels = [("", own)] if len(parts) == 1 else [(f"{number}/", part) for number, part in enumerate(parts)]
    return {f"{prefix}{file}": facts["sha256"] for prefix, label in labels for file, facts in manifest.inputs.get(label, {}).items()}
