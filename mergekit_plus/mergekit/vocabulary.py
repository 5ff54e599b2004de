"""The tokenizer and the chat template of a document's model: as yet the base model's tokenizer, under any template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .schema import Document, Reference, Tokenizer
from .templates import TEMPLATES

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def tokenizer_of(document: Document) -> Tokenizer | None:
    """What a document says of the tokenizer, in the one way or the other; None where it says nothing."""
    return document.tokenizer or (Tokenizer(source=document.tokenizer_source) if document.tokenizer_source else None)


def tokenizer_problem(document: Document) -> str | None:
    """Why the tokenizer that a document wants cannot be had."""
    wanted = tokenizer_of(document)
    if wanted is None:
        return None
    key = "tokenizer" if document.tokenizer else "tokenizer_source"
    if wanted.tokens or wanted.pad_to_multiple_of:
        return f"{key}: tokens and pad_to_multiple_of cannot be honoured yet; the base model's tokenizer is copied (`base`)"
    if str(wanted.source) not in ("base", str(document.references()[0])):
        return f"{key}: {wanted.source} cannot be built yet; the base model's tokenizer is copied (`base`)"
    return None


def with_tokenizer(document: Document, models: Mapping[Reference, Checkpoint]) -> Mapping[Reference, Checkpoint]:
    """The models under the vocabulary that the document wants; as yet the base model's, which theirs must be.

    Errors: CheckpointError where they differ.
    """
    if problem := tokenizer_problem(document):
        raise CheckpointError(problem)
    return models


def template_problem(document: Document) -> str | None:
    """Why a chat template cannot be one: it is neither a known name nor Jinja."""
    wanted = document.chat_template
    if wanted is None or wanted == "auto" or wanted in TEMPLATES or "{" in wanted:
        return None
    return f"chat_template: '{wanted}' is neither the name of one nor Jinja text; names are auto, {', '.join(TEMPLATES)}"


def with_template(result: Checkpoint, document: Document, models: Mapping[Reference, Checkpoint]) -> Checkpoint:
    """The model with the chat template that the document wants, in the file in which transformers looks first; `auto`: the one of most inputs.

    Errors: CheckpointError where there is no tokenizer to use it.
    """
    wanted = document.chat_template
    if wanted == "auto":
        counted = Counter(template for model in models.values() if (template := template_of(model)))
        wanted = counted.most_common(1)[0][0] if counted else None
    if wanted is None:
        return result
    if _CONFIG not in result.files:
        raise CheckpointError(f"chat_template: {next(iter(models.values())).label} has no {_CONFIG}, so no tokenizer would use it")
    kept = {name: content for name, content in result.files.items() if name != "chat_template.json"}
    config = {key: value for key, value in json.loads(result.file(_CONFIG)).items() if key != "chat_template"}
    files = {_CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n", _TEMPLATE: TEMPLATES.get(wanted, wanted).encode()}
    return replace(result, files={**kept, **files})


def template_of(model: Checkpoint) -> str | None:
    """A model's own chat template, from wherever its tokenizer keeps it."""
    if _TEMPLATE in model.files:
        return model.file(_TEMPLATE).decode().strip()
    for name in (_CONFIG, "chat_template.json"):
        found = json.loads(model.file(name)).get("chat_template") if name in model.files else None
        if isinstance(found, list):
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found.strip()
    return None
