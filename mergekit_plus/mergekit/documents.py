"""Several documents in one file: which is made of which, in which order, and which one is the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from .problems import parse
from .schema import Document


@dataclass(frozen=True)
class Read:
    """Documents in the order in which they are made, the result last; `contents` is what they were read from, without what was overlooked."""

    documents: tuple[Document, ...]
    contents: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    overlooked: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """The models that are opened for them, in order."""
        made = {document.name for document in self.documents}
        named = (model.ref for document in self.documents for model in (*document.references(), *document.donors()))
        return list(dict.fromkeys(ref for ref in named if ref not in made))


def read(given: object, lenient: bool = False) -> Read:
    """The documents of a file or of a recipe's step: one, or a list."""
    many = list(given) if isinstance(given, list | tuple) else [given]
    parsed = [parse(document, lenient) for document in many]
    places = [f"{part.content.get('name') or f'document {number}'}: " if len(parsed) > 1 else "" for number, part in enumerate(parsed, 1)]
    problems = [place + problem for place, part in zip(places, parsed, strict=True) for problem in part.problems]
    overlooked = tuple(place + key for place, part in zip(places, parsed, strict=True) for key in part.overlooked)
    documents = [part.document for part in parsed if part.document is not None]
    contents = [part.content for part in parsed]
    if problems or not documents:
        return Read((), tuple(contents), tuple(problems or ["there is no document"]), overlooked)
    order, problems = _order(documents)
    return Read(tuple(documents[number] for number in order), tuple(contents[number] for number in order), tuple(problems), overlooked)


def _order(documents: Sequence[Document]) -> tuple[list[int], list[str]]:
    """The documents in an order in which each comes after those that it is made of, and what is wrong with them together."""
    names = [document.name for document in documents]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice or names.count(None) > 1:
        return [], [f"two documents are called {', '.join(twice)}" if twice else "two documents have no name; only the last one needs none"]
    needs = [{names.index(model.ref) for model in (*document.references(), *document.donors()) if model.ref in names} for document in documents]
    try:
        order = list(TopologicalSorter(dict(enumerate(needs))).static_order())
    except CycleError as error:
        return [], [f"the documents are made of each other: {' -> '.join(str(names[number]) for number in error.args[1])}"]
    ends = [number for number in order if not any(number in needed for needed in needs)]
    if len(ends) > 1:
        shown = ", ".join(names[number] or f"document {number + 1}" for number in ends)
        return [], [f"no other document is made of {shown}; a run has one result, so that one may be left: put the others into files of their own"]
    return order, []


def as_recipe(read: Read) -> dict[str, Any]:
    """The recipe that a file of mergekit's is."""
    contents = list(read.contents)
    return {"inputs": {ref: ref for ref in read.models}, "steps": [{"mergekit": contents if len(contents) > 1 else contents[0]}]}
