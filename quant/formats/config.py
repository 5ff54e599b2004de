"""config.json's `quantization_config` for pack-quantized: written from schemes, and read back as schemes.

Exact rules in specs/quant_formats_and_peers.md 2.1. The traps: without `"quantization_status": "compressed"` transformers loads
random weights and says nothing; a key that compressed-tensors does not know inside `weights` is refused; of several targets that match
a module, libraries disagree which one counts, so those written here are disjoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_plus.errors import CheckpointError

from ..quantized import Scheme

NAME = "pack-quantized"
VERSION = "0.20.0"  # of compressed-tensors: the layout that is written
DENSE_SINCE = (0, 18)  # before this version 3, 5, 6 and 7 bits were stored with unused bits in each word
SAME_IN_ALL_VERSIONS = (2, 4, 8)


def config(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any] | None:
    """The `quantization_config` of a model; None where no module is quantised.

    layers: the scheme of every quantised module, by its name in the checkpoint ("model.layers.0.mlp.up_proj"). ignore: every linear
    module that is not quantised ("lm_head"); one that is in neither would be taken for quantised.
    """
    if not layers:
        return None
    schemes = list(dict.fromkeys(layers.values()))
    targets = {schemes[0]: ["Linear"]} if len(schemes) == 1 else _disjoint_targets(layers, ignore)
    return {
        "quant_method": "compressed-tensors",
        "format": NAME,
        "quantization_status": "compressed",
        "version": VERSION,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{index}": {
                "targets": targets[scheme],
                "format": NAME,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "strategy": "group" if scheme.group_size else "channel",
                    "group_size": scheme.group_size or None,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, scheme in enumerate(schemes)
        },
    }


def _disjoint_targets(layers: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[Scheme, list[str]]:
    """Targets for each scheme that match its modules, no module of another scheme, and none of `ignore`.

    Names that differ in numbers only ("model.layers.3.mlp.experts.7.up_proj") become one regex for each scheme, with the first number
    spelt out where schemes differ by it; names whose schemes differ by a later number stay as they are.
    """
    families: dict[tuple[str, ...], dict[str, dict[str, Scheme | None]]] = {}  # the text between numbers; the first number
    for name in (*layers, *ignore):
        text, numbers = tuple(re.split(r"\d+", name)), re.findall(r"\d+", name)
        families.setdefault(text, {}).setdefault(numbers[0] if numbers else "", {})[name] = layers.get(name)
    targets: dict[Scheme, list[str]] = {scheme: [] for scheme in layers.values()}
    for text, by_number in families.items():
        alike: dict[Scheme, list[str]] = {}
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


def read_config(config_json: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """The scheme of a module by its name, from a checkpoint's config.json; None for a module that is not quantised.

    Only names are looked at, as the checkpoint has no classes: the target "Linear" is taken to match every module, so ask about
    modules that have a `weight_packed`. Quantised key-value caches are not looked at.

    Errors: CheckpointError for anything that is not pack-quantized as compressed-tensors 0.18 and later store it.
    """
    found = config_json.get("quantization_config") or config_json.get("compression_config")
    if not found:
        return lambda module: None
    method = found.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise _unreadable(f"quantised with '{method}'")
    ignore = list(found.get("ignore") or ())
    schemes: dict[str, Scheme] = {}
    for group, entry in (found.get("config_groups") or {}).items():
        if not isinstance(entry, Mapping):
            raise _unreadable(f"{group}: a preset in place of a scheme")
        scheme = _read_group(group, entry, found)
        for target in entry.get("targets") or ():
            schemes.setdefault(target, scheme)

    def lookup(module: str) -> Scheme | None:
        if any(_matches(target, module) for target in ignore):
            return None
        # the order of compressed-tensors (utils/match.py match_targets): names, then regexes by their text, then classes
        ranked = sorted(schemes, key=lambda target: (target == "Linear", target.startswith("re:"), target))
        return next((schemes[target] for target in ranked if _matches(target, module)), None)

    return lookup


def _read_group(group: str, entry: Mapping[str, Any], whole: Mapping[str, Any]) -> Scheme:
    """The scheme of one config group."""
    layout = entry.get("format") or whole.get("format")
    if layout != NAME:
        raise _unreadable(f"{group}: format '{layout}'")
    if entry.get("input_activations") or entry.get("output_activations"):
        raise _unreadable(f"{group}: activations are quantised as well")
    weights = entry.get("weights") or {}
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or implied
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel") or weights.get("dynamic"):
        raise _unreadable(f"{group}: weights of type '{weights.get('type', 'int')}' with strategy '{strategy}'")
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise _unreadable(f"{group}: inputs in the order of their activations (actorder '{weights['actorder']}')")
    version = str(whole.get("version") or "unknown")
    if bits not in SAME_IN_ALL_VERSIONS and _version(version) < DENSE_SINCE:
        raise _unreadable(f"{group}: {bits} bits in the layout that compressed-tensors {version} had before 0.18")
    return Scheme(bits, int(size or 0) if strategy == "group" else 0, bool(weights.get("symmetric", True)))


def _unreadable(what: str) -> CheckpointError:
    return CheckpointError(
        f"quantization_config: {what}; what can be read is {NAME} with integer weights, by group or channel, as compressed-tensors"
        f" 0.18 and later store it. Start from the model that it was made of, or dequantise it first with the library that wrote it."
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


