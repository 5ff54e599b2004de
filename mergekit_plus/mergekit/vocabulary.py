"""The tokenizer and the chat template that a document wants, in the words of `mergekit_plus.vocabulary`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from ..checkpoint import Checkpoint
from ..vocabulary import ModelToken, TokenizerSpec, TokenRule, ZeroRow, retokenize
from ..vocabulary.chat import chat_problem
from ..vocabulary.spec import source_problem
from .schema import Document, Reference, Token


def with_vocabulary(document: Document, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models that a document merges, under the vocabulary and the chat template that it wants; `models` may hold others too.

    Errors: OptionError and CheckpointError as `retokenize`.
    """
    merged = {reference.ref: models[reference.ref] for reference in document.references()}
    spec = tokenizer_spec(document)
    base = document.base_model.ref if document.base_model else None
    return dict(merged) if spec is None else retokenize(merged, base, spec, models)


def tokenizer_spec(document: Document) -> TokenizerSpec | None:
    """What a document says of tokenizer and chat template; None where it says nothing.

    Errors: ValidationError for rules that contradict themselves.
    """
    wanted, template = document.tokenizer, document.chat_template
    if wanted is not None:
        tokens = {token: TokenRule(source=_source(rule), force=rule.force) for token, rule in wanted.tokens.items()}
        return TokenizerSpec(source=str(wanted.source), tokens=tokens, pad_to_multiple_of=wanted.pad_to_multiple_of, chat_template=template)
    source = document.tokenizer_source
    return TokenizerSpec(source=None if source is None else str(source), chat_template=template) if source or template else None


def _source(rule: Token) -> str | ZeroRow | ModelToken | None:
    if rule.source is None or isinstance(rule.source, Reference):
        return None if rule.source is None else rule.source.ref
    if rule.source.model is None:
        return ZeroRow(kind="zero")
    return ModelToken(kind="model_token", model=rule.source.model.ref, token=rule.source.token, token_id=rule.source.token_id)


def vocabulary_problems(document: Document) -> list[str]:
    """Why the tokenizer or the chat template that a document wants cannot be."""
    try:
        tokenizer_spec(document)
    except ValidationError as error:
        return [f"tokenizer: {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors()]
    names = [reference.ref for reference in document.references()]
    source = document.tokenizer.source if document.tokenizer else document.tokenizer_source
    if source is not None and (problem := source_problem(str(source), names)):
        return [f"tokenizer: {problem}"]
    problem = chat_problem(document.chat_template, names) if document.chat_template else None
    return [problem] if problem else []
