"""config.json's `quantization_config` of compressed-tensors: written from schemes, and read back as schemes.

Exact rules in specs/quant_formats_and_peers.md 2.1. The traps: without `"quantization_status": "compressed"` transformers loads
random weights and says nothing; a key that compressed-tensors does not know inside `weights` is refused; of several targets that match
a module, libraries disagree which one counts, so those written here are disjoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mergekit_plus.errors import CheckpointError

from ..floats import FP8, FP8_BLOCK, MXFP4, NVFP4, FloatScheme
from ..quantized import BITS, Scheme
from .format import AnyScheme

Kind = TypeVar("Kind", bound=Hashable)

NAME = "pack-quantized"
_LAYOUTS = (NAME, "int-quantized", "naive-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
VERSION = "0.20.0"  # of compressed-tensors: the layout that is written
DENSE_SINCE = (0, 18)  # before this version 3, 5, 6 and 7 bits were stored with unused bits in each word
SAME_IN_ALL_VERSIONS = (2, 4, 8)


def config(layers: Mapping[str, AnyScheme], ignore: Sequence[str], layout: str = NAME) -> dict[str, Any] | None:
    """The `quantization_config` of a model; None where no module is quantised.

    layers: the scheme of every quantised module, by its name in the checkpoint ("model.layers.0.mlp.up_proj"). ignore: every linear
    module that is not quantised ("lm_head"); one that is in neither would be taken for quantised.
    """
    if not layers:
        return None
    schemes = list(dict.fromkeys(layers.values()))
    targets = {schemes[0]: ["Linear"]} if len(schemes) == 1 else disjoint_targets(layers, ignore)
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "version": VERSION,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{index}": {
                "targets": targets[scheme],
                "format": layout,
                "weights": _weights(scheme),
                "input_activations": _activations(layout, scheme),
                "output_activations": None,
            }
            for index, scheme in enumerate(schemes)
        },
    }


def _weights(scheme: AnyScheme) -> dict[str, Any]:
    """What compressed-tensors says of the weights of a scheme."""
    if isinstance(scheme, Scheme):
        strategy, size = ("group", scheme.group_size) if scheme.group_size else ("channel", None)
        return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy, "group_size": size, "dynamic": False}
    common = {"num_bits": scheme.bits, "type": "float", "symmetric": True, "dynamic": False}
    if scheme == NVFP4:
        return {**common, "strategy": "tensor_group", "group_size": scheme.inputs, "scale_dtype": "torch.float8_e4m3fn"}
    if scheme == MXFP4:
        return {**common, "strategy": "group", "group_size": scheme.inputs, "scale_dtype": "torch.uint8"}
    return {**common, "strategy": "block", "block_structure": [scheme.outputs, scheme.inputs]} if scheme.inputs else {**common, "strategy": "channel"}


def _activations(layout: str, scheme: AnyScheme) -> dict[str, Any] | None:
    """What servers round activations to as they run: 8 bits of the weights' type, by token or by block; nothing where only weights are quantised."""
    if layout not in ("int-quantized", "float-quantized"):
        return None
    common = {"num_bits": 8, "type": "int" if isinstance(scheme, Scheme) else "float", "symmetric": True, "dynamic": True}
    blocks = isinstance(scheme, FloatScheme) and scheme.inputs
    return {**common, "strategy": "group", "group_size": blocks} if blocks else {**common, "strategy": "token"}


def disjoint_targets(layers: Mapping[str, Kind], ignore: Sequence[str]) -> dict[Kind, list[str]]:
    """Targets for each scheme that match its modules, no module of another scheme, and none of `ignore`.

    Names that differ in numbers only ("model.layers.3.mlp.experts.7.up_proj") become one regex for each scheme, with the first number
    spelt out where schemes differ by it; names whose schemes differ by a later number stay as they are.
    """
    families: dict[tuple[str, ...], dict[str, dict[str, Kind | None]]] = {}  # the text between numbers; the first number
    for name in (*layers, *ignore):
        text, numbers = tuple(re.split(r"\d+", name)), re.findall(r"\d+", name)
        families.setdefault(text, {}).setdefault(numbers[0] if numbers else "", {})[name] = layers.get(name)
    targets: dict[Kind, list[str]] = {scheme: [] for scheme in layers.values()}
    for text, by_number in families.items():
        alike: dict[Kind, list[str]] = {}
        uniform = len({scheme for names in by_number.values() for scheme in names.values()}) == 1
        for number, names in by_number.items():
            scheme = next(iter(names.values()))
            if len(text) > 1 and len(set(names.values())) == 1:
                if scheme is not None:
                    alike.setdefault(scheme, []).append(number)
                continue
            for name, own in names.items():
                if own is not None:
                    targets[own].append(name)
        for scheme, numbers in alike.items():
            first = r"\d+" if uniform else f"(?:{'|'.join(numbers)})"
            places = [first, *[r"\d+"] * (len(text) - 2), ""]
            pattern = "".join(re.escape(part) + place for part, place in zip(text, places, strict=True))
            targets[scheme].append(f"re:{pattern}$")
    return targets


@dataclass(frozen=True)
class Stored:
    """What config.json says of a module: the layout by which it is stored, its scheme, and whether activations are rounded as it runs."""

    layout: str
    scheme: AnyScheme
    activations: bool = False


def read_groups(found: Mapping[str, Any]) -> Callable[[str], Stored | None]:
    """How a module is stored, from a `quantization_config` of compressed-tensors.

    Only names are looked at, as the checkpoint has no classes: the target "Linear" is taken to match every module. Quantised key-value caches
    are not looked at.

    Errors: CheckpointError for what cannot be read.
    """
    ignore = [str(target) for target in found.get("ignore") or ()]
    groups: dict[str, Stored] = {}
    for group, entry in (found.get("config_groups") or {}).items():
        if not isinstance(entry, Mapping):
            raise unreadable(f"{group}: a preset in place of a scheme")
        stored = _read_group(group, entry, found)
        for target in entry.get("targets") or ():
            groups.setdefault(str(target), stored)
    for target in (*ignore, *groups):
        re.compile(target.removeprefix("re:"))

    def lookup(module: str) -> Stored | None:
        target = None if any(target_matches(target, module) for target in ignore) else first_target(groups, module)
        return None if target is None else groups[target]

    return lookup


def first_target(targets: Iterable[str], module: str) -> str | None:
    """The target that counts for a module; the order of compressed-tensors (utils/match.py match_targets): names, then regexes by their text, then classes."""
    ranked = sorted(targets, key=lambda target: (target == "Linear", target.startswith("re:"), target))
    return next((target for target in ranked if target_matches(target, module)), None)


def target_matches(target: str, module: str) -> bool:
    """Whether a target, or an entry of `ignore`, may mean this module."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def _read_group(group: str, entry: Mapping[str, Any], whole: Mapping[str, Any]) -> Stored:
    """How the modules of one config group are stored."""
    layout = str(entry.get("format") or whole.get("format"))
    weights = entry.get("weights") or {}
    bits, size, kind = weights.get("num_bits", 8), weights.get("group_size"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    what = f"{group}: weights of type '{kind}' with {bits} bits and strategy '{strategy}' in format '{layout}'"
    activations = bool(entry.get("input_activations") or entry.get("output_activations"))
    if reordered(weights):
        raise unreadable(f"{group}: inputs in the order of their activations (actorder '{weights['actorder']}')")
    if weights.get("dynamic") or layout not in _LAYOUTS:
        raise unreadable(what)
    integer = Scheme(bits, int(size or 0) if strategy == "group" else 0, bool(weights.get("symmetric", True))) if kind == "int" and bits in BITS else None
    if layout == NAME and integer and strategy in ("group", "channel"):
        version = str(whole.get("version") or "unknown")
        if in_old_words(bits, version):
            raise unreadable(f"{group}: {bits} bits in the layout that compressed-tensors {version} had before 0.18")
        return Stored(layout, integer, activations)
    if layout in ("int-quantized", "naive-quantized") and integer and strategy in ("group", "channel", "tensor"):
        return Stored("int-quantized", integer, activations)
    if layout in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8 and strategy in ("channel", "tensor", "block"):
        rows, inputs = (int(length) for length in weights["block_structure"]) if strategy == "block" else (1, 0)
        if rows < 1 or (strategy == "block" and inputs < 1):
            raise unreadable(what)
        return Stored("float-quantized", replace(FP8_BLOCK, outputs=rows, inputs=inputs) if strategy == "block" else FP8, activations)
    if kind == "float" and bits == 4:
        if layout == "nvfp4-pack-quantized" and size in (None, NVFP4.inputs) and strategy == "tensor_group":
            return Stored(layout, NVFP4, activations)
        if layout == "mxfp4-pack-quantized" and size == MXFP4.inputs and strategy == "group":
            return Stored(layout, MXFP4, activations)
    raise unreadable(what)


def unreadable(what: str) -> CheckpointError:
    """The error for a quantization_config that cannot be read."""
    return CheckpointError(
        f"quantization_config: {what}; what can be read is compressed-tensors (pack-quantized as 0.18 and later store it, int-, naive- and"
        " float-quantized, nvfp4 and mxfp4), gptq of 2, 3, 4 and 8 bits and awq (gemm). Start from the model that it was made of, or dequantize it"
        " first with the library that wrote it."
    )


def reordered(weights: Mapping[str, Any]) -> bool:
    """Whether inputs stand in the order of their activations, by what a config group says of its weights."""
    return weights.get("actorder") in (True, "group", "dynamic")


def in_old_words(bits: Any, version: str) -> bool:
    """Whether this version of compressed-tensors packed codes of so many bits otherwise than it does now."""
    return bits not in SAME_IN_ALL_VERSIONS and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < DENSE_SINCE
