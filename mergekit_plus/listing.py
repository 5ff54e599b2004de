"""The registries as data: every method, quantiser and pruner with its options."""

from __future__ import annotations

from typing import Any

from .errors import OptionError, nearest


def list_methods(name: str | None = None) -> dict[str, Any]:
    """Merge methods, quantisers, pruners and retraining variants by name, or the one that is asked for.

    Errors: OptionError for an unknown name.
    """
    from prune import PRUNERS
    from prune.perp import VARIANTS
    from quant import QUANTIZERS

    from .merge import METHODS, MergeMethod

    found: dict[str, Any] = {}
    for kind, entries in ((registry.kind, registry) for registry in (METHODS, QUANTIZERS, PRUNERS, VARIANTS)):
        for key, entry in entries.items():
            options = [
                {
                    "name": option.name, "type": option.type, "default": _plain(option.default), "required": option.required, "per_model": option.per_model,
                    "choices": list(option.choices), "help": option.help,
                }
                for option in entry.options.table.values()
            ]
            found[key] = {"kind": kind, "summary": entry.summary, "options": options}
            if isinstance(entry, MergeMethod):
                found[key]["needs_base"] = entry.needs_base
                found[key]["takes_base"] = entry.takes_base
                found[key]["from_first"] = entry.needs_base and entry.models == (1, 1)  # two models without a base: the first is where it starts
    if name is None:
        return found
    if name not in found:
        raise OptionError(f"unknown method '{name}'.{nearest(name, found)}")
    return {name: found[name]}


def _plain(default: object) -> object:
    return default[0] if isinstance(default, tuple) and len(default) == 1 else default
