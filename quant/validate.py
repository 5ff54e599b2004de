"""Whether what config.json says of packed weights fits the tensors, and would be loaded right: by transformers with compressed-tensors, by vLLM, by GPTQModel.

Several of these mistakes are loaded without a word and give nonsense. A problem is refused; a warning is about an engine that cannot load what is right.
Facts: compressed-tensors 0.20 with transformers 5.23, vLLM and GPTQModel as of August 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_plus.checkpoint import Checkpoint, Plan
from mergekit_plus.errors import CheckpointError
from mergekit_plus.model import describe, fused_groups

from .floats import FloatScheme
from .formats import READERS, AnyScheme, Module, holds_codes, stored_as
from .formats.config import NAME, Stored, in_old_words, reordered, target_matches
from .formats.gptq import zero_points
from .formats.reading import METHODS, declared, is_symmetric, lacking, misfit, parts_of, shape_of
from .quantized import Scheme

_WEIGHT_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype", "observer",
    "observer_kwargs",
}  # fmt: skip
Lookup = Callable[[str], Stored | None]


@dataclass
class Validation:
    """What is wrong, a sentence each, and what some engine cannot load."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, modules: Iterable[str], what: str) -> None:
        """A problem that some modules have."""
        if names := list(modules):
            self.problems.append(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}")


def refuse(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with warnings as notes. Errors: CheckpointError for what would be loaded wrongly."""
    found = validate(checkpoint)
    if found.problems:
        raise CheckpointError(f"{checkpoint.label}: {'; '.join(found.problems)}")
    return Checkpoint(checkpoint.label, checkpoint.source, checkpoint.files, (*checkpoint.notes, *found.warnings), checkpoint.pinned)


def validate(checkpoint: Checkpoint) -> Validation:
    """What is wrong with how a checkpoint says that it is quantised; nothing for a dense one.

    Reads headers, config.json and, of what is stored, GPTQ's zero points and groups.
    """
    found, config = Validation(), declared(checkpoint.config)
    packed = [name.rpartition(".")[0] for name in checkpoint.specs if holds_codes(checkpoint, name)]
    if not config:
        found.add(packed, "is packed, but config.json has no quantization_config, so that nobody can read it; restore the config.json it was written with")
        return found
    method = str(config.get("quant_method", "compressed-tensors"))
    if method not in METHODS:
        found.warnings.append(f"quantized with '{method}', which is not known here: how it is described was not checked")
        return found
    if method == "compressed-tensors":
        found.problems += _of_config(config)
    try:
        lookup = stored_as(checkpoint.config)
    except CheckpointError as error:
        found.problems += [] if found.problems else [str(error)]
        return found
    if not packed:
        found.problems.append("config.json has a quantization_config, but no tensor is packed; take it out if the tensors are right")
        return found
    dense = _dense(checkpoint, packed)
    _of_names(found, config, lookup, packed, dense)
    _of_tensors(found, checkpoint, lookup, packed)
    _of_fusing(found, lookup, packed, dense)
    if not found.problems:
        _of_values(found, checkpoint, lookup, packed)
        found.warnings += _of_engines({stored for module in packed if (stored := lookup(module))})
    return found


def _of_config(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a compressed-tensors config alone."""
    problems = []
    if (status := config.get("quantization_status")) != "compressed":
        problems.append(f"config.json: quantization_status is {status!r}, for which transformers loads random weights in silence; make it 'compressed'")
    for group, entry in _groups(config).items():
        weights, layout = entry.get("weights"), entry.get("format") or config.get("format")
        weights = weights if isinstance(weights, Mapping) else {}
        if not layout:
            problems.append(f"config.json: {group} has no format, and neither has the whole; name it in both, as in '{NAME}'")
        if unknown := sorted(set(weights) - _WEIGHT_KEYS):
            problems.append(f"config.json: {group} has the key '{unknown[0]}' inside 'weights', which compressed-tensors refuses; take it out")
        if reordered(weights):
            order = f"config.json: {group} has actorder {weights['actorder']!r}"
            problems.append(f"{order}, which compressed-tensors dropped in 0.19; dequantize it with an older one, and quantize anew")
        bits, version = weights.get("num_bits"), str(config.get("version") or "unknown")
        if weights.get("type", "int") == "int" and layout == NAME and in_old_words(bits, version):
            problems.append(f"config.json: {bits} bits with version '{version}': before 0.18 words were laid out otherwise; write the version that packed it")
    return problems


def _groups(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The config groups that are tables, as all are in what can be read."""
    groups = config.get("config_groups")
    return {str(name): entry for name, entry in groups.items() if isinstance(entry, Mapping)} if isinstance(groups, Mapping) else {}


def _dense(checkpoint: Checkpoint, packed: list[str]) -> list[str]:
    """Linear modules that are not packed, heads and tied ones among them."""
    roles, taken = describe(checkpoint), {f"{module}.weight" for module in packed}
    linears = [name for name, meaning in roles.tensors.items() if meaning.role in ("linear", "head") and len(checkpoint.specs[name].shape) == 2]
    tied = [name for group in roles.tied for name in group if name not in checkpoint.specs]
    return [name.removesuffix(".weight") for name in (*linears, *tied) if name.endswith(".weight") and name not in taken]


def _of_names(found: Validation, config: Mapping[str, Any], lookup: Lookup, packed: list[str], dense: list[str]) -> None:
    """Modules that config.json does not speak of as they are."""
    unnamed = [module for module in packed if lookup(module) is None]
    found.add(unnamed, "is packed, but config.json leaves it dense: engines would not find its weight; name it in a target, and not in ignore")
    method = config.get("quant_method", "compressed-tensors")
    if method == "compressed-tensors":
        found.add([module for module in dense if lookup(module)], "is dense, but a target of config.json matches it; add it to 'ignore'")
        groups = [[str(target) for target in entry.get("targets") or ()] for entry in _groups(config).values()]
        ambiguous = [module for module in packed if sum(any(target_matches(target, module) for target in group) for group in groups) > 1]
        found.add(ambiguous, "is matched by targets of several config_groups, of which engines do not choose the same; make targets disjoint")
        return
    key = "a rule '-:' of 'dynamic'" if method == "gptq" else "'modules_to_not_convert'"
    inside = [module for module in dense if any(character.isdigit() for character in module) and lookup(module)]
    found.add(inside, f"is dense, but config.json speaks of all layers of the blocks; add it to {key}")


def _of_tensors(found: Validation, checkpoint: Checkpoint, lookup: Lookup, packed: list[str]) -> None:
    """Tensors that are missing, too many, or of another shape than the scheme implies."""
    missing: dict[str, list[str]] = {}
    zeros, double, misfits = [], [], []
    for module in packed:
        if (stored := lookup(module)) is None:
            continue
        reader = READERS[stored.layout]
        have = parts_of(checkpoint, module, stored)
        if part := lacking(stored, have):
            missing.setdefault(part, []).append(module)
            continue
        if is_symmetric(stored) and "weight_zero_point" in have:
            zeros.append(module)
        if "weight" not in reader.parts and f"{module}.weight" in checkpoint.specs:
            double.append(module)
        try:
            reason = misfit(Module(module, stored, reader, have, (), shape_of(checkpoint, module, stored, have)))
        except CheckpointError as error:
            reason = str(error)
        misfits += [reason] if reason else []
    found.problems += [f"{misfits[0]}{f' (and so for {len(misfits) - 1} more)' if len(misfits) > 1 else ''}"] if misfits else []
    for part, modules in missing.items():
        found.add(modules, f"has no {part}, without which it cannot be unpacked; write the model anew")
    found.add(zeros, "is symmetric by config.json, but has a weight_zero_point, which vLLM refuses; say 'symmetric': false, or take the tensor out")
    found.add(double, "has both packed codes and a weight, of which engines take either; take one out")


def _of_fusing(found: Validation, lookup: Lookup, packed: list[str], dense: list[str]) -> None:
    """Layers that servers load as one and that are not alike."""
    inside = set(packed)
    for group in fused_groups([f"{module}.weight" for module in (*packed, *dense)]):
        schemes: dict[AnyScheme | None, str] = {}
        for module in (name.removesuffix(".weight") for name in group):
            stored = lookup(module) if module in inside else None
            schemes.setdefault(stored.scheme if stored else None, module)
        if len(schemes) > 1:
            (one, first), (other, second) = list(schemes.items())[:2]
            alike = f"{first} is {one or 'dense'} and {second} is {other or 'dense'}"
            found.problems.append(f"{alike}, but servers fuse them and load one scheme; quantize them alike")
            return  # one is enough


def _of_values(found: Validation, checkpoint: Checkpoint, lookup: Lookup, packed: list[str]) -> None:
    """GPTQ's zero points and the order of its inputs; looked at where they are stored already."""
    if isinstance(checkpoint.source, Plan):
        return
    shifted: dict[str, list[str]] = {}
    ordered = []
    for module in packed:
        stored = lookup(module)
        if stored is None or stored.layout not in ("gptq", "gptq_v2") or not isinstance(scheme := stored.scheme, Scheme):
            continue
        less, out = int(stored.layout == "gptq"), checkpoint.specs[f"{module}.qweight"].shape[1]
        if scheme.symmetric:
            zeros = zero_points({"qzeros": checkpoint.read(f"{module}.qzeros")}, scheme, out, less)
            if bool((zeros == (1 if less else -1)).all()):
                shifted.setdefault(stored.layout, []).append(module)
            elif bool((zeros != 0).any()):
                found.problems.append(f"{module} is symmetric by config.json, but its qzeros are not all {-scheme.low}; say 'sym': false")
        if f"{module}.g_idx" in checkpoint.specs and not declared(checkpoint.config).get("desc_act"):
            index = checkpoint.read(f"{module}.g_idx").long()
            if not torch.equal(index, torch.arange(len(index)) // (scheme.group_size or len(index))):
                ordered.append(module)
    for layout, modules in shifted.items():
        other = "gptq_v2" if layout == "gptq" else "gptq"
        found.add(modules, f"has zero points as {other} stores them, so that weights are off by one scale under '{layout}'; make checkpoint_format '{other}'")
    found.add(ordered, "has inputs in an order of their own (g_idx), which vLLM ignores without 'desc_act': true; say so")


def _of_engines(stored: set[Stored]) -> list[str]:
    """What an engine cannot load of what is right."""
    schemes = {each.scheme for each in stored if isinstance(each.scheme, Scheme)}
    asymmetric = {scheme for scheme in schemes if not scheme.symmetric}
    layouts = {each.layout for each in stored}
    warnings = []
    if asymmetric and NAME in layouts:
        if len(stored) > 1:
            warnings.append("transformers 5.23 cannot load zero points and several schemes at once; `compress dequantize` and vLLM (4 and 8 bits) do")
        else:
            warnings.append("transformers 5.23 loads zero points only with CompressedTensorsConfig(dequantize=True)")
        if {scheme.bits for scheme in asymmetric} - {4, 8}:
            warnings.append("vLLM runs zero points with 4 and 8 bits only")
    if layouts & {"gptq", "gptq_v2"} and (asymmetric or {scheme.bits for scheme in schemes} - {4, 8}):
        warnings.append("vLLM runs GPTQ's files of 4 and 8 bits, symmetric; GPTQModel runs these too")
    if "gptq" in layouts and asymmetric:
        warnings.append("in version 1 of GPTQ's files readers do not agree on zero points of 0; `compress convert --to gptq_v2` has no such doubt")
    if any(isinstance(each.scheme, FloatScheme) and each.scheme.inputs not in (0, 16, 32, 128) for each in stored):
        warnings.append("vLLM runs FP8 in blocks of 128 x 128")
    return warnings
