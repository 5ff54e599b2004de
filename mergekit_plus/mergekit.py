"""mergekit's YAML, read as a recipe: the same file, the same result; what it cannot mean is refused instead of ignored.

Here: `models`, `base_model`, scalar `parameters`, `dtype`, `out_dtype`, `tokenizer_source: base`, for the methods that both have. Slices, modules,
gradients, filters and tokenizer surgery are refused by name. Model paths are relative to where you stand, as with mergekit-yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import RecipeError
from .merge import METHODS
from .recipe import Recipe, check
from .steps import schema_problems

Scalar = bool | int | float | str
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    parameters: Parameters = Field(default_factory=dict)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    merge_method: str
    models: list[_Model] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None


_LATER = ("slices", "modules", "tokenizer", "chat_template")


def translate(parsed: Mapping[str, Any], name: str) -> Recipe:
    """A mergekit configuration as a recipe.

    Errors: RecipeError with every problem found.
    """
    if later := [key for key in _LATER if key in parsed]:
        raise RecipeError(f"{name}: {' and '.join(later)} of mergekit's schema cannot be read yet; `models:` can")
    try:
        config = _Config.model_validate(parsed)
    except ValidationError as error:
        raise RecipeError(f"{name}: {'; '.join(schema_problems(error, _Config))}") from None
    found = _values_that_vary(config)
    if config.tokenizer_source not in (None, "base", config.base_model):
        found.append(f"tokenizer_source: {config.tokenizer_source} cannot be built yet; the base model's tokenizer is copied (`base`)")
    if len({model.model for model in config.models}) < len(config.models):
        found.append("models: the same model is listed twice")
    if all(model.model == config.base_model for model in config.models):
        found.append("models: there is none besides the base model")
    if found:
        raise RecipeError(f"{name}: {'; '.join(found)}")

    needs_base = config.merge_method in list(METHODS) and METHODS[config.merge_method].needs_base  # an unknown method is refused with the step
    merged = [model for model in config.models if not (needs_base and model.model == config.base_model)]
    names = {ref: ref for ref in dict.fromkeys([model.model for model in merged] + ([config.base_model] if config.base_model else []))}
    step = {
        "method": config.merge_method,
        "models": {model.model: model.parameters for model in merged},
        "base": config.base_model,
        "input_dtype": config.dtype,
        "dtype": config.out_dtype,
        **config.parameters,
    }
    return check({"inputs": names, "steps": [{"merge": step}]}, Path(), name)


def _values_that_vary(config: _Config) -> list[str]:
    """Problems for parameters that are not one number for the whole model."""
    places = [("parameters", config.parameters), *((f"models.{model.model}.parameters", model.parameters) for model in config.models)]
    return [
        f"{place}.{key}: gradients and filters cannot be read yet; give one value"
        for place, parameters in places
        for key, value in parameters.items()
        if not isinstance(value, Scalar)
    ]
