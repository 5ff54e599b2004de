"""mergekit-moe's YAML, read as a recipe of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from ..moe.config import MoeConfig
from ..steps import schema_problems


def moe_recipe(parsed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mergekit-moe configuration as the content of a recipe, whose inputs go by their own paths.

    Errors: RecipeError with every problem found.
    """
    try:
        config = MoeConfig.model_validate(parsed)
    except ValidationError as error:
        raise RecipeError(f"{name}: {'; '.join(schema_problems(error, MoeConfig))}") from None
    return {"inputs": {model: model for model in config.models}, "steps": [{"moe": config.model_dump(exclude_none=True)}]}
