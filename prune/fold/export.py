"""A compact model for others to load: a base and a LoRA adapter of peft's, which together are its expanded model, with no code of ours.

    base, adapter = exported(compact, "peft", "out/base")

peft: the base has each set of shared weights once, as an ordinary model of few layers, which peft replicates (`layer_replication`); the adapter holds
each place's voices, and its norms (as `modules_to_save`), for a replicated layer would have those of the layer that it repeats. lora: the base has every
place, and the adapter is a plain one, as vLLM takes it, too. Voices are what they are in the compact model: its scale is 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

from mergekit_plus.adapters.extract import task_of
from mergekit_plus.adapters.layout import Product, adapter_of
from mergekit_plus.adapters.peft import PREFIX
from mergekit_plus.checkpoint import Checkpoint, copy_step
from mergekit_plus.checkpoint.folder import ADAPTER_CONFIG
from mergekit_plus.errors import CheckpointError
from mergekit_plus.model import describe, layer_of, meta_model

from .compact import A, B, fold_of, voice_of
from .surgery import Fold, folded, stack_of
from .tied import sites_of_compact, stored, without_voices

Layout = Literal["peft", "lora"]
NO_TARGETS = "dummy-target-modules"  # what peft takes for an adapter without low-rank factors


def exported(compact: Checkpoint, layout: Layout, name: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The base and the adapter of a compact checkpoint, or of the model that it was opened as; `name` is where the adapter says that its base is.

    Errors: CheckpointError for what is not compact, for a model whose layers peft cannot replicate, and for a plain adapter without voices.
    """
    compact = stored(compact)
    fold = fold_of(compact)
    if fold is None:
        raise CheckpointError(f"{compact.label} is not a compact model, which `compress fold --compact` makes; others are loaded as they are")
    plain = without_voices(compact)
    voices = [site for site in sites_of_compact(compact) if site.role == "voice" and site.name.endswith(f".{A}")]
    products, steps = [], []
    for site in voices:
        b = compact.specs[site.name.removesuffix(A) + B]
        product = Product(site.parameter.removesuffix(f".{A}"), site.shape[0], (b.rows, site.shape[1]))
        products.append(product)
        steps += [copy_step(compact, old, new.name) for old, new in zip((site.name, b.name), product.specs("F32"), strict=True)]
    if layout == "lora":
        if not products:
            raise CheckpointError(f"{compact.label} has no voices for an adapter to hold; write out the expanded model with --expand")
        return plain, adapter_of(f"adapter of {compact.label}", products, steps, name, task_of(plain))
    base = folded(plain, Fold.of([fold.groups.index(group) for group in range(len(fold.parents))]))
    _refuse_other_layers(base)
    private = _private(compact, plain, fold)
    steps += [copy_step(plain, tensor, f"{PREFIX}{parameter}") for tensor, parameter in private.items()]
    modules = list(dict.fromkeys(parameter.rpartition(".")[0] for parameter in private.values()))
    adapter = adapter_of(f"adapter of {compact.label}", products, steps, name, task_of(plain), modules_to_save=modules)
    more: dict[str, Any] = {"layer_replication": _ranges(fold), **({} if products else {"target_modules": NO_TARGETS})}
    config = json.dumps({**adapter.json_file(ADAPTER_CONFIG), **more}, indent=2).encode() + b"\n"
    return base, replace(adapter, files={ADAPTER_CONFIG: config})


def _ranges(fold: Fold) -> list[list[int]]:
    """The layers of the base that stand one after the other, as runs [first, last + 1]."""
    runs: list[list[int]] = []
    for group in fold.groups:
        if runs and runs[-1][1] == group:
            runs[-1][1] += 1
        else:
            runs.append([group, group + 1])
    return runs


def _private(compact: Checkpoint, plain: Checkpoint, fold: Fold) -> dict[str, str]:
    """What places have of their own, and which parameter of the model that is; what a group's first place has is the base's."""
    tensors, stack = describe(plain).tensors, stack_of(plain).stack or ""
    found = {}
    for name in compact.specs:
        place = layer_of(name)
        if place and place[0] == stack and fold.first(place[1]) != place[1] and voice_of(name) is None:
            found[name] = tensors[name].parameter or name
    return found


def _refuse_other_layers(base: Checkpoint) -> None:
    """Errors: CheckpointError where peft would not find the layers, or config.json speaks of them one by one, which peft does not extend."""
    part, model = stack_of(base), meta_model(base)
    while hasattr(model, "model"):
        model = model.model
    known = [getattr(model, "layers", None), getattr(getattr(model, "encoder", None), "layer", None), getattr(model, "h", None)]
    advice = "use --export lora, or --expand"
    if not any(layers is not None and len(layers) == len(part.layers) for layers in known):
        raise CheckpointError(f"{base.label}: peft finds the layers of Llama-, BERT- and Falcon-like models alone to replicate; {advice}")
    if said := [*part.per_layer, *part.layer_sets]:
        raise CheckpointError(f"{base.label}: peft does not extend what config.json says of layers one by one ({said[0]}) when it replicates them; {advice}")
