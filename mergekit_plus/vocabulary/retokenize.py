"""Models of different vocabularies as models of one, so that they can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint, Plan, copy_step
from ..errors import CheckpointError, OptionError
from ..model import vocabulary_size
from .chat import choose_template, with_template
from .files import tokenizer_files, with_vocabulary
from .rows import Source, Table, of_model, own_rows, rerow, rule_row, table
from .spec import TokenizerSpec
from .tables import vocabulary_tables
from .tokenizer import CONFIG, Tokenizer, is_tokenizer_file, read_tokenizer
from .union import unite, with_tokens


def retokenize(
    models: Mapping[str, Checkpoint], base: str | None, spec: TokenizerSpec, others: Mapping[str, Checkpoint] | None = None
) -> dict[str, Checkpoint]:
    """The models, each as a view whose embeddings, head and their biases have a row for every token of one tokenizer; nothing is read yet.

    models: what is merged, the base among them, by the names that `spec` uses. others: further models that `spec` may name.
    A row that a model lacks is the base's, else the only owner's, else the mean of the owners' (mergekit's rule), unless `spec.tokens` says
    otherwise; a token that nobody has is zeros, a padding row that nobody has the mean of the other rows. The table is as long as that
    of the tokenizer's owner, or as `pad_to_multiple_of` makes it.
    Errors: OptionError for unknown names; CheckpointError for tokenizers that are missing or cannot be united, and for rows that do not fit.
    """
    known = {**(others or {}), **models}
    if found := list(spec.problems(known)):
        raise OptionError("; ".join(f"tokenizer: {problem}" for problem in found))
    views = _revocabularied(models, base, spec, known) if spec.source is not None else dict(models)
    if spec.chat_template is not None and (template := choose_template(spec.chat_template, known, list(models))):
        donor = views[base or next(iter(models))]  # the result has its files
        if CONFIG not in donor.files:
            raise CheckpointError(f"chat_template: {donor.label} has no {CONFIG}, so no tokenizer would use it")
        views = {name: with_template(view, template) for name, view in views.items()}
    return views


def _revocabularied(models: Mapping[str, Checkpoint], base: str | None, spec: TokenizerSpec, known: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    first = base or next(iter(models))
    owner = first if spec.source in ("union", "base", None) else spec.source
    assert owner is not None
    named = dict.fromkeys([*models, owner, *spec.models()])
    tokenizers = _tokenizers({name: known[name] for name in named}, first)
    chosen = tokenizers[owner]
    if spec.source == "union":
        chosen = unite(chosen, [tokenizers[name] for name in models if name != owner])
    chosen = with_tokens(chosen, spec.tokens)

    sources = {name: Source(known[name], tokenizer.tokens) for name, tokenizer in tokenizers.items()}
    size = _size(chosen, spec.pad_to_multiple_of, known[owner])
    own = [own_rows(sources[name], chosen.tokens, size) for name in models]
    rules = {token: row for token, rule in spec.tokens.items() if (row := rule_row(token, rule, sources)) is not None}
    default = table(own, chosen.tokens, rules, list(models).index(base) if base is not None else None)
    forced = torch.tensor([chosen.tokens[token] for token, rule in spec.tokens.items() if rule.force], dtype=torch.int64)
    files = tokenizer_files(known[owner], chosen, chosen is not tokenizers[owner])
    views = {}
    for number, (name, model) in enumerate(models.items()):
        view = _view(model, number, of_model(default, number, own[number], forced), own, [source.checkpoint for source in sources.values()])
        views[name] = with_vocabulary(view, size, files, tokenizers[name].tokens, chosen.tokens, known[owner])
    return views


def _tokenizers(models: Mapping[str, Checkpoint], first: str) -> dict[str, Tokenizer]:
    """Every model's tokenizer. One that carries none and has as many rows as the base is taken to use the base's.

    Errors: CheckpointError for a model without a tokenizer.
    """
    files = {name: {file: model.file(file) for file in model.files if is_tokenizer_file(file) and "chat" not in file} for name, model in models.items()}
    found: dict[str, Tokenizer | None] = {}
    for name, model in models.items():
        twin = next((other for other in found if files[other] == files[name]), None)  # fine-tunes of one base: parsed once
        found[name] = found[twin] if twin else read_tokenizer(model)
    size = vocabulary_size(models[first])
    lacking = [name for name, tokenizer in found.items() if tokenizer is None and (found[first] is None or vocabulary_size(models[name]) != size)]
    if lacking:
        labels = ", ".join(models[name].label for name in lacking)
        raise CheckpointError(f"{labels}: no tokenizer beside the tensors, so that nobody knows which row is which token; put its tokenizer.json there")
    return {name: tokenizer or found[first] for name, tokenizer in found.items() if tokenizer or found[first]}  # type: ignore[misc]


def _size(tokenizer: Tokenizer, multiple: int | None, owner: Checkpoint) -> int:
    tokens = max(tokenizer.tokens.values()) + 1
    return -(-tokens // multiple) * multiple if multiple else max(tokens, vocabulary_size(owner) or 0)


def _view(model: Checkpoint, number: int, of: Table, own: Sequence[torch.Tensor], sources: Sequence[Checkpoint]) -> Checkpoint:
    tables = vocabulary_tables(model)
    steps = [rerow(name, number, of, own, sources) if name in tables else copy_step(model, name) for name in model.specs]
    return replace(model, source=Plan(steps))
