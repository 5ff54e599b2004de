"""Recipes with blanks: variables, a matrix of values, and files that several recipes share. What comes out has none of them left.

    include: [defaults.yaml]                 # tables of other files, under those of this one
    variables: {model: {env: MODEL}, group: 64}
    matrix: {bits: [3, 4]}                   # a recipe for each combination
    inputs: {model: $model}
    steps: [{quantize: {bits: $bits, group_size: $group}}]
    out: tuned-${bits}bit

`$name` alone is the value, a number where it is one; inside of a longer text it is written into it; `$$` is a dollar. A variable without a value
(`model:`) must be given one with `--set`; `{env: NAME}` takes it from the environment, `{env: NAME, default: VALUE}` where it is there. Without
`variables` and `matrix`, a dollar is a dollar.
"""

from __future__ import annotations

import itertools
import json
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import RecipeError, nearest
from .safe_yaml import read

KEYS = ("include", "variables", "matrix")
COMBINATIONS = 256  # at most
Document = dict[str, Any]


def expand(document: Mapping[str, Any], folder: Path, given: Mapping[str, Any]) -> dict[str, Document]:
    """A recipe as parsed YAML, without blanks, for each combination of its matrix; named like "bits=3, group=64", "" where there is no matrix.

    folder: what `include` is relative to. given: values for variables; for a name of the matrix one value, or a list that takes its place.
    Errors: RecipeError with every problem of the blanks.
    """
    whole = _included(document, folder, ())
    variables, matrix = (_table(whole.pop(key, None), key) for key in ("variables", "matrix"))
    found = [f"'{name}' is in variables and in matrix" for name in variables if name in matrix]
    found += [f"--set {name}: there is no such variable.{nearest(name, [*variables, *matrix])}" for name in given if name not in {*variables, *matrix}]
    axes = {name: _listed(given.get(name, values)) for name, values in matrix.items()}
    found += [f"matrix.{name}: it has no values" for name, values in axes.items() if not values]
    values = {}
    for name, default in variables.items():
        try:
            values[name] = given[name] if name in given else _value(name, default)
        except RecipeError as error:
            found.append(str(error))
    if found:
        raise RecipeError("; ".join(found))
    if not variables and not matrix:
        return {"": whole}
    combinations = [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*axes.values())]
    if len(combinations) > COMBINATIONS:
        raise RecipeError(f"matrix: {len(combinations)} combinations; at most {COMBINATIONS} are carried out")
    return {label(combination): _filled(whole, {**values, **combination}) for combination in combinations}


def label(combination: Mapping[str, Any]) -> str:
    """A combination as people read it."""
    return ", ".join(f"{name}={_said(value)}" for name, value in combination.items())


def _said(value: Any) -> str:
    """A value inside of a text, true and null as YAML writes them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _filled(document: Document, values: Mapping[str, Any]) -> Document:
    unknown: dict[str, None] = {}
    filled = _fill(document, values, unknown)
    if unknown:
        raise RecipeError("; ".join(f"there is no variable '{name}' ($$ is a dollar).{nearest(name, values)}" for name in unknown))
    assert isinstance(filled, dict)
    return filled


def _fill(node: Any, values: Mapping[str, Any], unknown: dict[str, None]) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, values, unknown) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, values, unknown) for value in node]
    return _text(node, values, unknown) if isinstance(node, str) and "$" in node else node


def _text(text: str, values: Mapping[str, Any], unknown: dict[str, None]) -> Any:
    template = string.Template(text)
    if not template.is_valid():
        raise RecipeError(f"'{text}': a $ stands before a name; $$ is a dollar")
    names = template.get_identifiers()
    if missing := [name for name in names if name not in values]:
        unknown |= dict.fromkeys(missing)
        return text
    if len(names) == 1 and text in (f"${names[0]}", f"${{{names[0]}}}"):
        return values[names[0]]
    for name in names:
        if isinstance(values[name], list | dict):
            raise RecipeError(f"'{text}': {name} is {values[name]!r}, which cannot stand inside of a text")
    return template.substitute({name: _said(values[name]) for name in names})


def _value(name: str, default: Any) -> Any:
    if isinstance(default, dict) and default.keys() <= {"env", "default"} and "env" in default:
        if default["env"] in os.environ:
            return os.environ[default["env"]]
        if "default" in default:
            return default["default"]
        raise RecipeError(f"variables.{name}: the environment has no {default['env']}; set it, or give --set {name}=VALUE")
    if default is None:
        raise RecipeError(f"variables.{name}: it has no value; give one with --set {name}=VALUE")
    return default


def _included(document: Mapping[str, Any], folder: Path, within: Sequence[Path]) -> Document:
    """The document over the tables of the files that it includes; a later one lies over an earlier one."""
    names = document.get("include", [])
    whole: Document = {}
    for name in _listed(names):
        if not isinstance(name, str):
            raise RecipeError(f"include: it lists files, not {name!r}")
        path = (folder / name).resolve()
        if path in within:
            raise RecipeError(f"include: {name} includes itself")
        other = read(path)
        if not isinstance(other, dict):
            raise RecipeError(f"include: {name} is not a table")
        whole = _over(whole, _included(other, path.parent, (*within, path)))
    own = {key: value for key, value in document.items() if key != "include"}
    laid: Document = _over(whole, own)
    return laid


def _over(below: Any, above: Any) -> Any:
    """Tables are laid over each other key by key; anything else takes the place of what it lies on."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _over(below[key], value) if key in below else value for key, value in above.items()}}


def _table(value: Any, key: str) -> Document:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise RecipeError(f"{key}: it must be a table of names and values")
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
