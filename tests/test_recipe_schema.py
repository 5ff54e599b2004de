"""The published schema allows what recipes may be, and tells what they may not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
from mergekit_plus.recipe import load, plan, run
from mergekit_plus.recipe_schema import as_json, recipe_schema
from mergekit_plus.starter import starter
from mergekit_plus.steps import Execution

REPOSITORY = Path(__file__).parent.parent
MODELS = REPOSITORY / "tests" / "models"
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def wrong(step: dict[str, Any], **beside: Any) -> bool:
    """Whether a recipe of this one step is refused."""
    return not VALIDATOR.is_valid({"inputs": {"a": "a"}, "steps": [step], **beside})


def test_the_published_schema_is_that_of_the_models_and_a_schema() -> None:
    assert (REPOSITORY / "docs/recipe.schema.json").read_text() == as_json()  # compress schema > docs/recipe.schema.json
    jsonschema.Draft202012Validator.check_schema(json.loads(as_json()))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(path.read_text()))] == []


def test_the_recipes_that_outputs_hold_are_valid(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"inputs": {"m": str(MODELS / "code")}, "steps": [{"quantize": {"bits": 4, "group_size": 32}}]}))
    run(load(tmp_path / "recipe.yaml"), Execution(out=tmp_path / "out"))
    VALIDATOR.validate(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()))


def test_short_forms_options_of_methods_and_blanks_are_allowed() -> None:
    assert not wrong({"quantize": None})
    assert not wrong({"quantize": {"bits": "$bits", "method": "gptq", "damp": 0.01, "calibration": "text.txt"}}, matrix={"bits": [3, 4]})
    assert not wrong({"merge": {"models": {"a": None, "b": {"weight": 1}}, "method": "ties", "density": {"depth": [0, 1]}}})
    assert not wrong({"prune": {"pattern": "2:4", "reconstruct": "block", "calibration": ["a.txt", "b.txt"]}})
    assert not wrong({"retrain": {"train": "norms", "text": {"texts": "a.txt"}, "lr": 0.1}}, checks={"sample": "x", "limits": {"bytes": "4GB", "kl": {"t": 1}}})


def test_what_is_misspelt_or_of_another_kind_is_marked() -> None:
    assert wrong({"quantise": {}})
    assert wrong({"quantize": {"bist": 4}})
    assert wrong({"quantize": {"bits": "four"}})
    assert wrong({"merge": {"models": ["a"], "desnity": 1}})
    assert wrong({"fold": {}, "prune": {}})
    assert wrong({"quantize": {}}, cheks={})
    assert wrong({"quantize": {}}, checks={"limits": {"perplexity": "low"}})


# ---- a recipe to begin with ----


def test_a_recipe_to_begin_with_is_valid_and_runs_as_it_is(tmp_path: Path) -> None:
    text = starter(Checkpoint.open(MODELS / "code"), str(MODELS / "code"), "code")
    VALIDATOR.validate(yaml.safe_load(text))
    (tmp_path / "recipe.yaml").write_text(text)
    outcome = run(load(tmp_path / "recipe.yaml"), Execution(out=tmp_path / "out"))
    assert outcome.failures == []
    assert [verdict.what for verdict in outcome.verdicts] == ["bits a weight", "loading in transformers"]
    assert outcome.sampled[0]["prompt"] == "The meaning of life is"


def test_what_it_leaves_in_comments_is_valid_too() -> None:
    text = starter(Checkpoint.open(MODELS / "code"), "code", "code")
    *rest, after = text.partition("steps:")
    uncommented = "".join(rest) + re.sub("\n( *)# ", r"\n\1", after)
    VALIDATOR.validate(yaml.safe_load(uncommented))
    assert list(yaml.safe_load(uncommented)["checks"]["limits"]) == ["bits_per_weight", "perplexity_ratio", "kl"]


def test_several_models_are_merged_first(tmp_path: Path) -> None:
    places = {name: str(MODELS / name) for name in ("docs", "base")}
    tuned = starter(Checkpoint.open(MODELS / "code"), str(MODELS / "code"), "merged", places, "base")
    VALIDATOR.validate(yaml.safe_load(tuned))
    assert yaml.safe_load(tuned)["steps"][0] == {"merge": {"method": "ties", "base": "base", "models": ["model", "docs"], "density": 0.5}}
    assert yaml.safe_load(tuned)["out"] == "merged-4bit"
    (tmp_path / "recipe.yaml").write_text(tuned)
    assert plan(load(tmp_path / "recipe.yaml"), Execution(out=tmp_path / "out"))["tensors"]["computed"] > 0
    alike = starter(Checkpoint.open(MODELS / "code"), "code", "merged", {"docs": "docs"})
    assert yaml.safe_load(alike)["steps"][0] == {"merge": {"method": "linear", "models": ["model", "docs"]}}


def test_groups_are_those_that_the_model_has(tmp_path: Path) -> None:
    assert yaml.safe_load(starter(tiny_model("LlamaForCausalLM", tmp_path), "m", "m"))["steps"] == [{"quantize": {"bits": 4, "group_size": 16}}]


def test_what_is_small_already_has_no_recipe_to_begin_with(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"inputs": {"m": str(MODELS / "code")}, "steps": [{"quantize": {"bits": 4, "group_size": 32}}]}))
    run(load(tmp_path / "recipe.yaml"), Execution(out=tmp_path / "out"))
    with pytest.raises(CheckpointError, match="out is quantized already; begin with the model that it was made from"):
        starter(Checkpoint.open(tmp_path / "out"), "out", "out")
