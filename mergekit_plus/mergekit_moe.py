"""mergekit-moe's YAML, read as a recipe. Model paths are relative to where you stand, as with mergekit-moe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import RecipeError
from .moe.config import MoeConfig
from .recipe import Recipe, check
from .steps import schema_problems


def translate(parsed: Mapping[str, Any], name: str) -> Recipe:
    """A mergekit-moe configuration as a recipe.

    Errors: RecipeError with every problem found.
    """
    try:
        config = MoeConfig.model_validate(parsed)
    except ValidationError as error:
        raise RecipeError(f"{name}: {'; '.join(schema_problems(error, MoeConfig))}") from None
    return check({"inputs": {model: model for model in config.models}, "steps": [{"moe": config.model_dump(exclude_none=True)}]}, Path(), name)
