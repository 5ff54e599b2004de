"""mergekit's YAML schema, all of it, as mergekit 0.1.5 reads it, except that what mergekit ignores in silence is a problem here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator

from ..errors import nearest
from ..merge import METHODS
from ..steps import Strict

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Reference:
    """A model as a document names it: `ref` is what `Checkpoint.open` takes, `architecture` overrides the one in its config.json."""

    ref: str
    architecture: str | None = None

    def __str__(self) -> str:
        return self.ref


def reference(value: object) -> Reference:
    """`path@revision+lora@revision`, or {model: {path, revision}, lora: ..., override_architecture}; a path that exists is one, whatever is in it."""
    if isinstance(value, Reference):
        return value
    if isinstance(value, str) and value:
        return Reference(value)
    if not isinstance(value, dict) or "model" not in value or value.keys() - {"model", "lora", "override_architecture"}:
        raise ValueError(f"a model is a path, org/name[@revision], or a table of model, lora and override_architecture, not {value!r}")
    architecture = value.get("override_architecture")
    if not isinstance(architecture, str | None):
        raise ValueError(f"override_architecture is the name of a class, not {architecture!r}")
    parts = [_path(value["model"]), *([_path(value["lora"])] if value.get("lora") else [])]
    return Reference("+".join(parts), architecture)


def _path(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict) or not isinstance(value.get("path"), str) or value.keys() - {"path", "revision"}:
        raise ValueError(f"where a model is, is a path or a table of path and revision, not {value!r}")
    return f"{value['path']}@{value['revision']}" if value.get("revision") else value["path"]


class Conditional(Strict):
    """A value, or a gradient of values over the layers, for the tensors whose name holds `filter`."""

    value: Scalar | Annotated[list[Scalar], Field(min_length=1)]
    filter: str | None = None

    @property
    def values(self) -> list[Scalar]:
        """Its values, one or the points of a gradient."""
        return self.value if isinstance(self.value, list) else [self.value]


def _conditionals(value: object) -> object:
    """Every way to write a setting as the longest: a list of conditional values."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return value
    return [value] if isinstance(value, dict) else [{"value": value}]


def _table(value: object) -> object:
    return {} if value is None else value


def _list(value: object) -> object:
    return [] if value is None else value


Setting = Annotated[list[Conditional], BeforeValidator(_conditionals), Field(min_length=1)]
Parameters = dict[str, Setting]
_Parameters = Annotated[Parameters, BeforeValidator(_table)]
Model = Annotated[Reference, PlainValidator(reference)]


class Listed(Strict):
    """An entry of `models:`."""

    model: Model
    parameters: _Parameters = Field(default_factory=dict)


class Source(Listed):
    """An entry of `sources:`, some layers of a model."""

    layer_range: tuple[int, int]

    @field_validator("layer_range")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("give the first layer and the one after the last, as in [0, 8]")
        return value


class Slice(Strict):
    """Some layers of the output, from as many layers of each source."""

    sources: list[Source] = Field(min_length=1)
    base_model: Model | None = None
    parameters: _Parameters = Field(default_factory=dict)
    residual_weight: float | None = None  # no effect, in mergekit neither


class Body(Strict):
    """What a document, or one module of it, is made of."""

    slices: Annotated[list[Slice], BeforeValidator(_list)] = Field(default_factory=list)
    models: Annotated[list[Listed], BeforeValidator(_list)] = Field(default_factory=list)
    parameters: _Parameters = Field(default_factory=dict)


class Module(Body):
    """One module of a model that has several."""

    @model_validator(mode="after")
    def _one_way(self) -> Module:
        if bool(self.slices) == bool(self.models):
            raise ValueError("give either models or slices")
        return self


class ModelToken(Strict):
    """The embedding of a token of a model."""

    kind: str
    model: Model | None = None
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _one_token(self) -> ModelToken:
        if self.kind not in ("zero", "model_token"):
            raise ValueError(f"unknown kind '{self.kind}'.{nearest(self.kind, ('zero', 'model_token'))}")
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise ValueError("kind: model_token needs model, and either token or token_id")
        return self


def _token_source(value: object) -> object:
    return ModelToken.model_validate(value) if isinstance(value, dict) and "kind" in value else reference(value)


class Token(Strict):
    """Where a token's embedding comes from; `force`: even in models that have the token."""

    source: Annotated[ModelToken | Reference, PlainValidator(_token_source)] | None = None
    force: bool = False


class Tokenizer(Strict):
    """`tokenizer:`; `source` is "union", "base" or a model."""

    source: str | Annotated[Reference, PlainValidator(reference)] = "union"
    tokens: Annotated[dict[str, Token], BeforeValidator(_table)] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class Document(Body):
    """A whole document."""

    merge_method: str
    name: str | None = None  # by which another document of the same file refers to this one
    base_model: Model | None = None
    modules: Annotated[dict[str, Module], BeforeValidator(_table)] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    tokenizer_source: str | Annotated[Reference, PlainValidator(reference)] | None = None
    chat_template: str | None = None

    @property
    def bodies(self) -> dict[str, Body]:
        """Its modules by name; a document without modules is the one of no name."""
        return dict(self.modules) if self.modules else {"": self}

    def references(self) -> list[Reference]:
        """Every model that it names, in order: the base model first, then as they are written."""
        found = [self.base_model]
        for body in self.bodies.values():
            found += [listed.model for listed in body.models]
            for part in body.slices:
                found += [part.base_model, *(source.model for source in part.sources)]
        return list(dict.fromkeys(model for model in found if model is not None))

    def donors(self) -> list[Reference]:
        """Further models that its tokenizer takes something from."""
        found: list[Reference | str | None] = [self.tokenizer_source]
        if self.tokenizer is not None:
            found += [self.tokenizer.source]
            for rule in self.tokenizer.tokens.values():
                found += [rule.source.model if isinstance(rule.source, ModelToken) else rule.source]
        named = (Reference(source) if isinstance(source, str) else source for source in found if source not in (None, "union", "base"))
        return [reference for reference in dict.fromkeys(named) if reference is not None]


def listed_models(body: Body, base: Reference | None) -> list[tuple[Reference, Parameters]]:
    """The models of `models:`, the base model last where it is not among them, for mergekit merges it with the others; none for slices."""
    listed = [(entry.model, entry.parameters) for entry in body.models]
    return [*listed, *([(base, {})] if listed and base and all(model != base for model, _ in listed) else [])]


def origin_of(method: str, models: Sequence[Reference], base: Reference | None) -> int | None:
    """Which of the models the method starts from: the first that is the base model, if the method has a base."""
    return next((number for number, model in enumerate(models) if model == base), None) if METHODS[method].takes_base else None
