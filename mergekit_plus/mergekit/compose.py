"""From documents to a checkpoint: a slice is a merge of renamed views of its sources, a model is the union of its slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..checkpoint import Checkpoint, Plan, Step, renamed, steps_of
from ..checkpoint.dtypes import parse_float_dtype
from ..errors import CheckpointError, nearest
from ..layers import Part, layer_misfits, layer_places, parts_of, with_table
from ..merge import METHODS
from ..merge.plan import MergeOptions, merge, with_merged_config
from .parameters import has_gradient, options_of
from .schema import Body, Document, Parameters, Reference, Slice, Source, listed_models, origin_of
from .slices import Stack
from .vocabulary import with_vocabulary

Opened = Mapping[Reference, Checkpoint]


@dataclass(frozen=True)
class Input:
    """A model at work in one merge: `names` gives its tensors under the names of the output, all of them as they are where it is None."""

    model: Reference
    parameters: Parameters
    names: Mapping[str, str] | None = None


def compose(documents: Sequence[Document], opened: Mapping[str, Checkpoint], how: MergeOptions) -> Checkpoint:
    """The last document's model; documents come after those that they name as models.

    Errors: OptionError and CheckpointError where the models and the documents do not fit together, before any tensor is read.
    """
    made = dict(opened)
    result: Checkpoint | None = None
    for document in documents:
        result = _compose_one(document, made, how)
        if document.name:
            made[document.name] = replace(result, label=document.name)
    assert result is not None
    return result


def _compose_one(document: Document, made: Mapping[str, Checkpoint], how: MergeOptions) -> Checkpoint:
    opened = with_vocabulary(document, made)
    models = {reference: _of_architecture(opened[reference.ref], reference.architecture) for reference in document.references()}
    donor = next(iter(models.values()))  # the base model, or the first that is named
    how = replace(how, dtype=_tag(document.out_dtype), input_dtype=_tag(document.dtype))
    return _whole(document, models, donor, how) if document.models else _sliced(document, models, donor, how)


def _tag(dtype: str | None) -> str | None:
    return parse_float_dtype(dtype) if dtype else None


def _of_architecture(model: Checkpoint, architecture: str | None) -> Checkpoint:
    return model.with_config(architectures=[architecture]) if architecture else model


def _merged(
    method: str,
    inputs: Sequence[Input],
    base: Reference | None,
    scopes: Sequence[Parameters],
    models: Opened,
    how: MergeOptions,
    place: Callable[[str], float],
    donor: Checkpoint | None = None,
) -> Checkpoint:
    """One merge; the first input that is the base model is the base, where the method has one. donor: whose small files the result has, else the first's."""
    views = [models[part.model] if part.names is None else renamed(models[part.model], part.names) for part in inputs]
    origin = origin_of(method, [part.model for part in inputs], base)
    others = [number for number in range(len(inputs)) if number != origin]
    options = options_of(method, [inputs[number].parameters for number in others], scopes, [inputs[number].names or {} for number in others], place)
    return merge([views[number] for number in others], method, donor if origin is None else views[origin], options, how)


def _whole(document: Document, models: Opened, donor: Checkpoint, how: MergeOptions) -> Checkpoint:
    """`models:` at the top: every tensor by its name, whatever the architecture."""
    inputs = [Input(model, own) for model, own in listed_models(document, document.base_model)]
    gradients = any(has_gradient(parameters) for parameters in (document.parameters, *(part.parameters for part in inputs)))
    place = partial(_at, layer_places(models[inputs[0].model].specs) if gradients else {})
    beside = None if METHODS[document.merge_method].takes_base else donor
    return _merged(document.merge_method, inputs, document.base_model, [document.parameters], models, how, place, beside)


def _sliced(document: Document, models: Opened, donor: Checkpoint, how: MergeOptions) -> Checkpoint:
    parts = {reference: parts_of(model) for reference, model in models.items()}
    _check_modules(document, next(iter(parts.values())), donor.label)
    steps: list[Step] = []
    tables: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for module, body in document.bodies.items():
        wanted = dict.fromkeys(source.model for part in body.slices for source in part.sources)
        wanted |= dict.fromkeys(model for model, _ in listed_models(body, document.base_model))
        own = {reference: _part(parts[reference], module, reference) for reference in wanted}
        slices = body.slices or [_all_layers(body, document.base_model, own)]
        scopes = [body.parameters, document.parameters] if module else [document.parameters]
        stack = Stack(slices, own, models)
        for number, part in enumerate(slices):
            names, places = stack.names(number), stack.places(number)
            if not any(names):  # a slice of no layers between others
                continue
            inputs = [Input(source.model, source.parameters, taken) for source, taken in zip(part.sources, names, strict=True)]
            base = part.base_model or document.base_model
            steps += steps_of(_merged(document.merge_method, inputs, base, [part.parameters, *scopes], models, how, partial(_at, places)))
        donor_part = _part(next(iter(parts.values())), module, donor.label)
        tables.append((donor_part.config, stack.config(donor_part, donor)))
    label = f"{document.merge_method} of {', '.join(model.label for model in models.values())}"
    result = Checkpoint(label, Plan(steps), donor.files)
    result = with_merged_config(result, list(models.values()), split=True)
    for path, entries in tables:
        result = with_table(result, path, entries)
    if misfits := layer_misfits(result):
        for model in models.values():  # old checkpoints hold buffers that the architecture has no more
            known = layer_misfits(model)
            misfits = {misfit: problem for misfit, problem in misfits.items() if misfit not in known}
    if misfits:
        first, *more = misfits.values()
        raise CheckpointError(f"the slices do not make a model: {first}{f', and {len(more)} more such' if more else ''}")
    return result


def _at(places: Mapping[str, float], name: str) -> float:
    return places.get(name, 0.0)


def _all_layers(body: Body, base: Reference | None, parts: Mapping[Reference, Part]) -> Slice:
    """`models:` of a module as one slice of all their layers."""
    listed = listed_models(body, base)
    counts = {str(model): len(parts[model].layers) for model, _ in listed}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"modules: {', '.join(f'{model} has {count} layers' for model, count in counts.items())}; say with slices which to take")
    sources = [Source.model_construct(model=model, layer_range=(0, counts[str(model)]), parameters=own) for model, own in listed]
    return Slice.model_construct(sources=sources)


def _part(parts: Mapping[str, Part], module: str, model: object) -> Part:
    """The part of a model that a document calls so; the only one of a model is called `default`, or nothing."""
    name = "" if module == "default" and "" in parts else module
    if name in parts:
        return parts[name]
    if not module:
        names = ", ".join(dict.fromkeys(part.name for part in parts.values()))
        raise CheckpointError(f"{model} has several modules ({names}); give the slices of each under `modules`")
    known = nearest(module, parts) if "" not in parts else " It is in one piece: give slices or models without `modules`."
    raise CheckpointError(f"{model} has no module '{module}'.{known}")


def _check_modules(document: Document, parts: Mapping[str, Part], label: str) -> None:
    """Refuse a document that leaves a module out."""
    named = {_part(parts, module, label).name for module in document.bodies}
    if lost := [name for name in dict.fromkeys(part.name for part in parts.values()) if name not in named]:
        raise CheckpointError(f"modules: {', '.join(lost)} of {label} would be lost; say under `modules` which models they are to come from")
