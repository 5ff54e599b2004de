"""What a merge may be told about the tokenizer of its result: the keys of mergekit's `tokenizer` and `chat_template`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import closest, nearest
from .chat import chat_problem

WORDS = ("union", "base")  # for a source that is no model's name


def source_problem(source: str, models: Collection[str]) -> str | None:
    """Why this is no source, before anything is opened: no model goes by it, and it is nearly one of the words."""
    if source in WORDS or source in models or Path(source).exists() or closest(source, WORDS) is None:
        return None
    return f"'{source}' is no model.{nearest(source, WORDS)}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ZeroRow(_Strict):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelToken(_Strict):
    """The row that a model has for another token, by its text or by its id."""

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a model_token is named by `token` or by `token_id`, one of the two")
        return self


class TokenRule(_Strict):
    """Where the row of one token comes from in the models that lack it; with `force`, in all of them."""

    source: str | ZeroRow | ModelToken | None = None  # a model: its row of this token
    force: bool = False

    @model_validator(mode="after")
    def _force_needs_a_source(self) -> TokenRule:
        if self.force and self.source is None:
            raise ValueError("force puts one row into every model; say with `source` which")
        return self


class TokenizerSpec(_Strict):
    """The tokenizer of a merge. `source` None leaves the vocabularies as they are; models are named as the merge names its inputs."""

    source: str | None = None  # "union", "base", or a model
    tokens: dict[str, TokenRule] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    chat_template: str | None = None  # "auto", a built-in name, a model, or Jinja text

    @model_validator(mode="after")
    def _rows_need_a_source(self) -> TokenizerSpec:
        if self.source is None and (self.tokens or self.pad_to_multiple_of):
            raise ValueError("say with `source` which tokenizer the result gets: union, base, or a model")
        return self

    def models(self) -> Iterator[str]:
        """Every model that it names, except in `chat_template`."""
        if self.source is not None and self.source not in WORDS:
            yield str(self.source)
        for rule in self.tokens.values():
            if isinstance(rule.source, str):
                yield rule.source
            elif isinstance(rule.source, ModelToken):
                yield rule.source.model

    def problems(self, known: Iterable[str]) -> Iterator[str]:
        """A sentence for each name that is none of the known models."""
        names = list(known)
        for name in dict.fromkeys(self.models()):
            if name not in names:
                yield f"'{name}' is not an input.{nearest(name, [*names, *WORDS] if name == self.source else names)}"
        if self.chat_template is not None and (problem := chat_problem(self.chat_template, names)):
            yield problem
