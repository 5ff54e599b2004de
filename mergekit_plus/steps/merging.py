"""Steps that make one model of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import parse_float_dtype
from ..errors import not_inputs
from ..merge import METHODS
from ..merge.plan import MergeOptions, merge, problems
from ..moe.config import MoeConfig
from ..search.space import SearchOptions
from ..vocabulary import TokenizerSpec, retokenize
from .base import Execution, dtype_problems


class MergeStep(BaseModel):
    """`merge:` — the keys beside these are options of the method."""

    model_config = ConfigDict(extra="allow")

    method: str = "linear"
    models: dict[str, dict[str, Any]] | list[str]  # names of inputs, or name: {option: value of this model}
    base: str | None = None
    dtype: str | None = None
    input_dtype: str | None = None
    exclude: list[str] = Field(default_factory=list)
    include: list[str] = Field(default_factory=list)
    seed: int = 0
    search: SearchOptions | None = None  # options to be found before the merge
    searched: dict[str, Any] | None = None  # the record of the search that found these options
    tokenizer: TokenizerSpec | None = None  # or its source alone: union, base, an input

    @field_validator("tokenizer", mode="before", json_schema_input_type=TokenizerSpec | str | None)
    @classmethod
    def _short_tokenizer(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("models", mode="before", json_schema_input_type=dict[str, dict[str, Any] | None] | list[str])
    @classmethod
    def _named_models(cls, value: object) -> object:
        """Refuse in one sentence what is neither a list nor a table; `code:` with nothing after it has no options of its own."""
        if isinstance(value, dict):
            value = {name: {} if own is None else own for name, own in value.items()}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        wanted: type = dict if isinstance(value, dict) else str
        if not parts or not all(isinstance(part, wanted) for part in parts):
            raise ValueError("a list of inputs, as in [code, docs], or a table with the options of each, as in {code: {weight: 0.6}, docs: {}}")
        return value

    def options(self) -> dict[str, Any]:
        """The method's options; per-model ones gathered in the models' order."""
        given = dict(self.model_extra or {})
        if isinstance(self.models, dict):
            for name in dict.fromkeys(name for own in self.models.values() for name in own):
                if all(name in own for own in self.models.values()):
                    given[name] = [own[name] for own in self.models.values()]
                elif name in given or _default_of(self.method, name) is not None:
                    rest = given.get(name, _default_of(self.method, name))
                    given[name] = [own.get(name, rest) for own in self.models.values()]
                else:  # no such option, which is for the method to say
                    given[name] = [own[name] for own in self.models.values() if name in own]
        return given

    def with_options(self, values: Mapping[str, Any]) -> MergeStep:
        """The same step with these options, whatever it or single models of it said of them."""
        models = self.models
        if isinstance(models, dict):
            models = {name: {key: value for key, value in own.items() if key not in values} for name, own in models.items()}
        return self.model_copy(update={"models": models, **values})

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"merge: {problem}" for problem in not_inputs((*self.models, *([self.base] if self.base else [])), inputs))
        for problem in self.tokenizer.problems(inputs) if self.tokenizer else ():
            yield f"merge, tokenizer: {problem}"
        for problem in problems(self.method, self.options(), len(self.models), self.base is not None):
            yield f"merge: {problem}"
        yield from dtype_problems("merge", self.dtype, self.input_dtype)

    def search_problems(self, folder: Path) -> list[str]:
        """What is wrong with its search; texts are relative to `folder`."""
        return self.search.problems(self.method, self.options(), list(self.models), self.base, folder) if self.search else []

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        options = MergeOptions(
            parse_float_dtype(self.dtype) if self.dtype else None,
            parse_float_dtype(self.input_dtype) if self.input_dtype else None,
            tuple(self.exclude), tuple(self.include), self.seed, how.device, how.save.allow_nonfinite,
        )  # fmt: skip
        parts: Mapping[str, Checkpoint] = {name: inputs[name] for name in (*self.models, *([self.base] if self.base else []))}
        if self.tokenizer:
            parts = retokenize(parts, self.base, self.tokenizer, inputs)
        return merge([parts[name] for name in self.models], self.method, parts[self.base] if self.base else None, self.options(), options)


class MergekitStep(RootModel[Any]):
    """`mergekit:` — a document in mergekit's schema, or a list of them; the models that they name are inputs."""

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        from ..mergekit import read

        found = read(self.root)
        yield from (f"mergekit: {problem}" for problem in [*found.problems, *not_inputs(found.models, inputs)])

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from ..mergekit import compose, read

        return compose(read(self.root).documents, inputs, MergeOptions(device=how.device, allow_nonfinite=how.save.allow_nonfinite))


class MoeStep(MoeConfig):
    """`moe:` — a mixture of experts from dense models."""

    def problems(self, inputs: Mapping[str, object]) -> Iterator[str]:
        yield from (f"moe: {problem}" for problem in not_inputs(self.models, inputs))
        for conflict in self.conflicts():
            yield f"moe: {conflict}"

    def build(self, inputs: Mapping[str, Checkpoint], previous: Checkpoint | None, how: Execution) -> Checkpoint:
        from ..moe.plan import moe

        return moe(inputs, self)


def _default_of(method: str, name: str) -> Any:
    option = METHODS[method].options.table.get(name)
    default = option.default if option else None
    return default[0] if isinstance(default, tuple) else default
