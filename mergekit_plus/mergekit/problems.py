"""What is wrong with a document, all of it at once and before anything is opened; what mergekit would ignore can be overlooked."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import OptionError, nearest
from ..merge import METHODS
from ..merge.plan import count_problem
from ..merge.plan import problems as merge_problems
from ..steps import schema_problems
from .parameters import options_of, varying
from .schema import Document, Parameters, Reference, listed_models, origin_of
from .vocabulary import vocabulary_problems

DTYPES = ("float16", "bfloat16", "float32", "float64")
Place = tuple[int | str, ...]  # keys and numbers, from the document inward


@dataclass(frozen=True)
class Parsed:
    """A document as it was read: `content` is what `document` was made of. Where there are problems there is none."""

    document: Document | None
    content: dict[str, Any]
    problems: tuple[str, ...] = ()
    overlooked: tuple[str, ...] = ()  # unknown keys that were taken out


def parse(given: object, lenient: bool = False) -> Parsed:
    """Read a document; `lenient` takes out keys that mergekit would ignore, and options that the method does not have."""
    if not isinstance(given, Mapping):
        return Parsed(None, {}, ("a document of mergekit's is a table with merge_method",))
    content, overlooked, problems = copy.deepcopy(dict(given)), list[str](), list[str]()
    while True:
        document = None
        try:
            document = Document.model_validate(content)
            ignored = ignored_options(document)
        except ValidationError as error:
            sentences = schema_problems(error, Document)
            unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
            said = [sentence for sentence in sentences if "unknown key" in sentence]
            ignored = {place: _misplaced(place, content) or sentence for place, sentence in zip(unknown, said, strict=True)}
            problems = [] if ignored else sentences
        if not ignored:
            break
        overlooked += ignored.values()
        for place in ignored:
            _drop(content, place)
    problems = top_problems(content) + problems
    if document is not None and document.merge_method in METHODS:
        values = value_problems(document)
        problems += values + structure_problems(document, whole=not values)
    if not lenient:
        problems, overlooked = overlooked + problems, []
    return Parsed(None if problems else document, content, tuple(problems), tuple(overlooked))


def _misplaced(place: Place, content: Mapping[str, Any]) -> str | None:
    """What to do with an unknown key that is an option of the method."""
    method, key = content.get("merge_method"), place[-1]
    if not isinstance(method, str) or method not in METHODS or key not in METHODS[method].options.table:
        return None
    return f"{'.'.join(map(str, place))} is an option of {method}: write it under `parameters`"


def top_problems(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values at the top, each by itself."""
    found = []
    if sum(bool(content.get(key)) for key in ("models", "slices", "modules")) != 1:
        found.append("give exactly one of models, slices and modules")
    if content.get("tokenizer") and content.get("tokenizer_source"):
        found.append("give either tokenizer or tokenizer_source")
    for key in ("dtype", "out_dtype"):
        dtype = content.get(key)
        if isinstance(dtype, str) and dtype.removeprefix("torch.") not in DTYPES:
            found.append(f"{key}: unknown dtype '{dtype}'.{nearest(dtype, DTYPES)}")
    method = content.get("merge_method")
    if isinstance(method, str) and method not in METHODS:
        found.append(f"unknown {METHODS.kind} '{method}'.{nearest(method, METHODS)}")
    return found


def _drop(content: Any, place: Place) -> None:
    """Take out the key at this place; a setting that was written short has no list around it."""
    for part in place[:-1]:
        content = content if part == 0 and isinstance(content, dict) else content[part]
    del content[place[-1]]


def _tables(document: Document) -> Iterator[tuple[Place, Parameters, bool]]:
    """Every table of parameters: where it stands, what it holds, and whether it is one model's own."""
    yield ("parameters",), document.parameters, False
    for name, body in document.bodies.items():
        at: Place = ("modules", name) if name else ()
        if name:
            yield (*at, "parameters"), body.parameters, False
        for number, listed in enumerate(body.models):
            yield (*at, "models", number, "parameters"), listed.parameters, True
        for number, part in enumerate(body.slices):
            yield (*at, "slices", number, "parameters"), part.parameters, False
            for index, source in enumerate(part.sources):
                yield (*at, "slices", number, "sources", index, "parameters"), source.parameters, True


def ignored_options(document: Document) -> dict[Place, str]:
    """The parameters that mergekit would not look at, by their place, each with a sentence."""
    found = dict[Place, str]()
    if document.merge_method not in METHODS:
        return found
    method = METHODS[document.merge_method]
    for place, parameters, own in _tables(document):
        where = ".".join(map(str, place))
        for name in parameters:
            option = method.options.table.get(name)
            if option is None:
                found[*place, name] = f"{where}: {method.name} has no option '{name}'.{nearest(name, method.options.table)}"
            elif own and not option.per_model:
                found[*place, name] = f"{where}: '{name}' is one for all models; write it under the parameters of the slice or the document"
    return found


def value_problems(document: Document) -> list[str]:
    """A sentence for each value that its option cannot have; every end of a gradient is looked at."""
    options = METHODS[document.merge_method].options
    found = []
    for place, parameters, _ in _tables(document):
        for name, setting in parameters.items():
            for value in (value for conditional in setting for value in conditional.values if name in options.table):
                about = [problem for problem in options.problems({name: value}) if f" {name}=" in problem]
                found += [f"{'.'.join(map(str, place))}: {problem}" for problem in about]
    return list(dict.fromkeys(found))


def structure_problems(document: Document, whole: bool) -> list[str]:
    """A sentence for each merge that its method cannot do; `whole`: options are looked at together too, where they are the same for all tensors."""
    method, base = METHODS[document.merge_method], document.base_model
    found = vocabulary_problems(document)
    merges: list[tuple[str, list[tuple[Reference, Parameters]], Reference | None, list[Parameters]]] = []
    for name, body in document.bodies.items():
        at = f"modules.{name}." if name else ""
        scopes = [body.parameters, document.parameters] if name else [document.parameters]
        if len({entry.model for entry in body.models}) < len(body.models):
            found.append(f"{at}models: the same model is listed twice")
        if listed := listed_models(body, base):
            merges.append((f"{at}models", listed, base, scopes))
            if len(listed) > len(body.models) and (lonely := _base_without_options(document, scopes)):
                found.append(f"{at}models: {lonely}")
        for number, part in enumerate(body.slices):
            sources = [(source.model, source.parameters) for source in part.sources]
            lengths = [source.layer_range[1] - source.layer_range[0] for source in part.sources]
            if len(set(lengths)) > 1:
                found.append(f"{at}slices.{number}: the sources of a slice must have as many layers each, not {', '.join(map(str, lengths))}")
            merges.append((f"{at}slices.{number}", sources, part.base_model or base, [part.parameters, *scopes]))
    for place, inputs, start, scopes in merges:
        names = [model for model, _ in inputs]
        origin = origin_of(method.name, names, start)
        others = [parameters for number, (_, parameters) in enumerate(inputs) if number != origin]
        if not others:
            found.append(f"{place}: there is none besides the base model")
        elif method.takes_base and start and origin is None:
            found.append(f"{place}: base_model {start} is not among the sources, so that it is not said which of its layers to start from")
        elif method.needs_base and start is None and method.models != (1, 1):
            found.append(f"{place}: {method.name} needs the model that the others start from: give it as base_model")
        elif reason := count_problem(method.name, len(others), origin is not None):
            found.append(f"{place}: {reason}")
        elif whole and not any(map(varying, [*others, *scopes])):
            found += [f"{place}: {problem}" for problem in _problems_together(method.name, others, scopes, origin is not None)]
    if method.scope == "model" and len(merges) > 1:
        found.append(f"{method.name} measures whole models, and slices and modules would be measured each alone; list whole models under `models`")
    return found


def _problems_together(method: str, own: Sequence[Parameters], scopes: Sequence[Parameters], base: bool) -> list[str]:
    """What is wrong with options that are the same for all tensors."""
    try:
        options = options_of(method, own, scopes, [{}] * len(own), lambda name: 0.0)
    except OptionError as error:
        return [str(error)]
    assert isinstance(options, Mapping)
    return merge_problems(method, options, len(own), base)


def _base_without_options(document: Document, scopes: Sequence[Parameters]) -> str | None:
    """Why a base model that is not listed cannot be merged as one more model, which it is where the method knows no base."""
    method = METHODS[document.merge_method]
    wanted = [option.name for option in method.options.table.values() if option.per_model and not any(option.name in scope for scope in scopes)]
    if method.takes_base or not wanted:
        return None
    return (
        f"{method.name} has no base: base_model {document.base_model} would be merged as one more model, and nothing says its {' and '.join(wanted)}; "
        "list it with its own, or leave base_model out"
    )
