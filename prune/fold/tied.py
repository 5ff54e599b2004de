"""A compact model in memory, to train: the weights of a group are one parameter, each place has its own norms and its own voice.

    model = load_tied(compact)                       # a transformers model
    sites_of_compact(compact)                        # what may train, each once, under the names in the compact checkpoint

A voice stands on its linear layer as two thin ones, `lora_A` and `lora_B`, whose output is added by a hook: the weight W + B A is never formed, so that
a step costs what the two cost, and an adapter on what is shared (mask_lora, under its mask) does not see it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mergekit_plus.checkpoint import Checkpoint, Plan
from mergekit_plus.checkpoint.plan import renamed
from mergekit_plus.evaluate import Reader, load_model
from mergekit_plus.model import layer_of
from mergekit_plus.progress import Progress, quiet

from ..perp import Site, sites_of
from .compact import KEY, A, B, expanded, fold_of, voice_of, with_code
from .maps import set_parameter


def stored(checkpoint: Checkpoint) -> Checkpoint:
    """The compact checkpoint that was opened as this model; another checkpoint, one that was expanded before it was written among them, as it is."""
    if not isinstance(checkpoint.source, Plan):
        return checkpoint
    (part, *others) = {id(part): part for step in checkpoint.source.steps for part, _ in step.reads}.values() or [checkpoint]
    if others or isinstance(part.source, Plan) or fold_of(part) is None or expanded(part).specs != checkpoint.specs:
        return checkpoint
    return replace(with_code(part), label=checkpoint.label, pinned=checkpoint.pinned)


def without_voices(compact: Checkpoint) -> Checkpoint:
    """The ordinary model in which blocks have what they share, and nothing beside it; another checkpoint as it is."""
    if fold_of(compact) is None:
        return compact
    said = {key: value for key, value in compact.config[KEY].items() if key != "ranks"}
    shared = renamed(compact, {name: name for name in compact.specs if voice_of(name) is None})
    return expanded(shared.with_config(**{KEY: said}))


def sites_of_compact(compact: Checkpoint) -> tuple[Site, ...]:
    """The tensors of a compact checkpoint that may train, or of an ordinary one; reads headers and config.json only.

    Errors: as `sites_of`.
    """
    fold = fold_of(compact)
    plain = {site.name: site for site in sites_of(without_voices(compact))}
    if fold is None:
        return tuple(plain.values())
    also: dict[str, list[str]] = {}
    for name, site in plain.items():
        if name not in compact.specs and (place := layer_of(name)):
            stack, number = f"{place[0]}." if place[0] else "", place[1]
            also.setdefault(f"{stack}{fold.first(number)}{name.removeprefix(f'{stack}{number}')}", []).append(site.parameter)
    own = [replace(site, also=tuple(also.get(name, ()))) for name, site in plain.items() if name in compact.specs or site.tied]
    modules = {name.removesuffix(".weight"): site.parameter.removesuffix(".weight") for name, site in plain.items()}
    factors = [(name, module) for name in compact.specs if (module := voice_of(name)) is not None]
    voices = [Site(name, modules[module] + name.removeprefix(module), "voice", compact.specs[name].shape) for name, module in factors]
    return (*own, *voices)


def load_tied(compact: Checkpoint, progress: Progress | None = None) -> Any:
    """The transformers model of a compact checkpoint, in float32, on the CPU, in evaluation mode; an ordinary one as `load_model` gives it.

    Memory: the expanded model while it is read; what is shared stands once afterwards.
    """
    model = load_model(without_voices(compact), progress=progress)
    reader = Reader(compact, quiet())  # A and B are one step, until they lie in a file
    for site in sites_of_compact(compact):
        for path in site.also:
            set_parameter(model, path, model.get_parameter(site.parameter))
        if site.role == "voice" and site.name.endswith(A):
            give_voice(model.get_submodule(site.parameter.removesuffix(f".{A}")), reader.read(site.name), reader.read(site.name.removesuffix(A) + B))
    return model.eval()


def give_voice(linear: nn.Module, a: Tensor, b: Tensor) -> None:
    """Add x A^T B^T to what a linear layer makes of x; A [rank, in], B [out, rank] become parameters of its parts `lora_A` and `lora_B`."""
    for name, factor in ((A, a), (B, b)):
        thin = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
        thin.weight = nn.Parameter(factor.float().clone())
        linear.add_module(name.removesuffix(".weight"), thin)
    linear.register_forward_hook(_speak)


def _speak(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    a, b = (linear.get_submodule(name.removesuffix(".weight")) for name in (A, B))
    spoken: Tensor = output + b(a(args[0]))
    return spoken
