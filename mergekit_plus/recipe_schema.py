"""The JSON Schema of recipes, for editors: made from the models that read them, so that it allows what they allow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from pydantic.json_schema import models_json_schema

from prune import PRUNERS
from prune.perp import VARIANTS
from quant import QUANTIZERS

from .merge import METHODS
from .options import Option
from .recipe_file import Recipe
from .steps import OPERATIONS
from .training import TrainOptions

BLANK = {"type": "string", "pattern": r"\$"}  # what a variable is to fill in
BLANKS: dict[str, Any] = {
    "include": {"description": "recipes that this one lies over, key by key", "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "variables": {"description": "values by name, for $name below; without a value: to be given with --set; {env: NAME, default: ...}", "type": "object"},
    "matrix": {"description": "values by name, of which each combination is a recipe", "type": "object", "additionalProperties": {"type": "array"}},
}

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema (JSON Schema 2020-12) of a recipe with its blanks. Options of methods are listed without their types, which depend on the method."""
    _, made = models_json_schema([(model, "validation") for model in (Recipe, *OPERATIONS.values())])
    parts: dict[str, Schema] = made["$defs"]
    for name, options in _methods_options().items():
        own = parts[name]
        own["properties"] |= {option: described for option, described in options.items() if option not in own["properties"]}
        own["additionalProperties"] = False
    root = parts.pop("Recipe")
    operations = {name: {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"}, {"type": "null"}]} for name, model in OPERATIONS.items()}
    root["properties"]["steps"] = {
        "type": "array", "description": "one after the other; nothing is written in between",
        "items": {"type": "object", "properties": operations, "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    }  # fmt: skip
    for schema in (root, *parts.values()):
        schema["properties"] = {name: _or_blank(value) for name, value in schema.get("properties", {}).items()}
    root["properties"] = {**BLANKS, **root["properties"]}
    root.pop("required", None)  # an included file may have it
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "title": "mergekit-plus recipe", "$defs": parts}


def as_json() -> str:
    """The schema as a file holds it."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def _methods_options() -> dict[str, dict[str, Schema]]:
    """By the step that takes them, the options of all of its methods."""
    training = {field.name: {"description": "of the training"} for field in fields(TrainOptions)}
    retraining = training | _described(VARIANTS)
    merging = _described(METHODS)
    return {
        "MergeStep": merging, "MergeAdaptersStep": merging, "QuantizeStep": _described(QUANTIZERS), "PruneStep": _described(PRUNERS),
        "RetrainStep": retraining, "RepairOptions": retraining,
    }  # fmt: skip


def _described(registry: Mapping[str, Any]) -> dict[str, Schema]:
    """Every option of a registry's methods, with what they say of it."""
    found: dict[str, Schema] = {}
    for method, option in _options(registry.items()):
        found.setdefault(option.name, {"description": f"{option.help} ({method})"})
    return found


def _options(entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Option]]:
    return ((name, option) for name, entry in entries for option in entry.options.table.values())


def _or_blank(schema: Schema) -> Schema:
    """The same, or a text with a variable in it; schemas without a type allow that already."""
    if not schema.keys() & {"type", "anyOf", "oneOf", "$ref", "const", "enum"} or schema.get("type") == "string":
        return schema
    about = {key: value for key, value in schema.items() if key in ("description", "default", "title")}
    return {**about, "anyOf": [{key: value for key, value in schema.items() if key not in about}, BLANK]}
