"""Recipes with blanks: variables, matrices and shared files, filled in before anything is checked."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from mergekit_plus.errors import RecipeError
from mergekit_plus.recipe import load, load_all, outs
from mergekit_plus.safe_yaml import parse
from mergekit_plus.template import expand

MODELS = Path(__file__).parent / "models"


def filled(text: str, folder: Path = Path(), **given: Any) -> dict[str, Any]:
    """What becomes of YAML text."""
    return expand(parse(textwrap.dedent(text), "text"), folder, given)


def refused(text: str, folder: Path = Path(), **given: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        filled(text, folder, **given)
    return str(caught.value).split("; ")


def test_a_blank_alone_keeps_the_kind_of_its_value_and_one_in_a_text_is_written_into_it() -> None:
    found = filled("{variables: {bits: 4, who: code}, a: $bits, b: ['x-${bits}bit', '${who}/$who'], c: {d: $who}, e: $$5, f: 3}")
    assert found == {"": {"a": 4, "b": ["x-4bit", "code/code"], "c": {"d": "code"}, "e": "$5", "f": 3}}


def test_a_value_may_be_a_list_or_a_table() -> None:
    assert filled("{variables: {limits: {code: 3}, models: [a, b]}, m: $models, l: $limits}") == {"": {"m": ["a", "b"], "l": {"code": 3}}}
    assert refused("{variables: {models: [a, b]}, m: all-$models}") == ["'all-$models': models is ['a', 'b'], which cannot stand inside of a text"]


def test_each_combination_of_a_matrix_is_a_recipe_in_the_order_written() -> None:
    found = filled("{matrix: {bits: [3, 4], method: [rtn, gptq]}, x: $bits-$method}")
    assert {name: document["x"] for name, document in found.items()} == {
        "bits=3, method=rtn": "3-rtn", "bits=3, method=gptq": "3-gptq", "bits=4, method=rtn": "4-rtn", "bits=4, method=gptq": "4-gptq",
    }  # fmt: skip


def test_given_values_go_before_those_written_and_take_the_place_of_an_axis() -> None:
    text = "{variables: {group: 64}, matrix: {bits: [3, 4]}, x: [$bits, $group]}"
    assert filled(text, group=32, bits=2) == {"bits=2": {"x": [2, 32]}}
    assert list(filled(text, bits=[2, 8])) == ["bits=2", "bits=8"]


def test_a_variable_without_a_value_must_be_given_one() -> None:
    assert refused("{variables: {model: null}, x: $model}") == ["variables.model: it has no value", "give one with --set model=VALUE"]
    assert filled("{variables: {model: null}, x: $model}", model="a")[""] == {"x": "a"}


def test_the_environment_is_read_where_the_recipe_says_so_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNED", "./tuned")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert filled("{variables: {m: {env: TUNED}, n: {env: NOT_THERE, default: 7}}, x: [$m, $n]}")[""] == {"x": ["./tuned", 7]}
    assert refused("{variables: {m: {env: NOT_THERE}}, x: $m}")[0] == "variables.m: the environment has no NOT_THERE"
    assert refused("{variables: {m: 1}, x: $TUNED}") == ["there is no variable 'TUNED' ($$ is a dollar). Known: m."]


def test_without_blanks_a_dollar_is_a_dollar() -> None:
    assert filled("{x: $bits, y: ['$', '$$']}") == {"": {"x": "$bits", "y": ["$", "$$"]}}


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("{variables: {bits: 4}, x: $bit}", {}, "there is no variable 'bit' ($$ is a dollar). Did you mean 'bits'?"),
        ("{variables: {bits: 4}, x: $bits}", {"bist": 3}, "--set bist: there is no such variable. Did you mean 'bits'?"),
        ("{x: 1}", {"bits": 3}, "--set bits: there is no such variable."),
        ("{variables: {bits: 4}, x: 5$}", {}, "'5$': a $ stands before a name"),
        ("{variables: {bits: 4}, matrix: {bits: [3]}}", {}, "'bits' is in variables and in matrix"),
        ("{matrix: {bits: []}}", {}, "matrix.bits: it has no values"),
        ("{matrix: [3, 4]}", {}, "matrix: it must be a table of names and values"),
        ("{variables: {a-b: 4}}", {}, "variables: it must be a table of names and values"),
        ("{matrix: {a: [1,2,3,4,5,6,7], b: [1,2,3,4,5,6,7], c: [1,2,3,4,5,6,7]}}", {}, "matrix: 343 combinations"),
        ("{include: nowhere.yaml}", {}, "nowhere.yaml: No such file or directory"),
        ("{include: [3]}", {}, "include: it lists files, not 3"),
    ],
)
def test_blanks_that_cannot_be_filled_say_what_is_wrong(text: str, given: dict[str, Any], message: str) -> None:
    assert refused(text, **given)[0].removeprefix(f"{Path.cwd()}/") == message


def test_an_included_file_lies_under_the_one_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "checks.yaml").write_text("checks: {windows: 5, limits: {kl: 1, top1: 0.5}}\nsteps: [{dequantize: {}}]\ninclude: deeper.yaml")
    (tmp_path / "shared" / "deeper.yaml").write_text("out: deep\nvariables: {bits: 4}")
    found = filled("{include: [shared/checks.yaml], checks: {limits: {kl: 2}}, steps: [], inputs: {a: a$bits}}", tmp_path)
    assert found[""] == {"checks": {"windows": 5, "limits": {"kl": 2, "top1": 0.5}}, "steps": [], "out": "deep", "inputs": {"a": "a4"}}


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml")
    (tmp_path / "b.yaml").write_text("include: a.yaml")
    assert refused("{include: a.yaml}", tmp_path) == ["include: a.yaml includes itself"]


# ---- as recipes ----

MATRIX = """
    matrix: {bits: [3, 4]}
    variables: {model: }
    inputs: {model: $model}
    steps: [{quantize: {bits: $bits, group_size: 32}}]
    out: %s
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(MATRIX % "tuned-${bits}bit"))
    return tmp_path / "recipe.yaml"


def test_a_recipe_is_checked_in_each_combination_and_names_it(recipe: Path) -> None:
    found = load_all(recipe, given={"model": str(MODELS / "code")})
    assert {name: one.out for name, one in found.items()} == {"bits=3": "tuned-3bit", "bits=4": "tuned-4bit"}
    with pytest.raises(RecipeError, match=r"recipe.yaml \(bits=30\): quantize: .*30"):
        load_all(recipe, given={"model": "m", "bits": 30})


def test_what_is_several_recipes_is_not_read_as_one(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml is 2 recipes \(bits=3; bits=4\); choose one with --set NAME=VALUE"):
        load(recipe, given={"model": "m"})
    assert load(recipe, given={"model": "m", "bits": 4}).out == "tuned-4bit"


def test_combinations_go_to_places_of_their_own(recipe: Path) -> None:
    found = load_all(recipe, given={"model": "m"})
    assert outs(found, Path("x")) == {"bits=3": Path("x-bits-3"), "bits=4": Path("x-bits-4")}
    assert outs(found, None) == {"bits=3": None, "bits=4": None}
    with pytest.raises(RecipeError, match=r"^-o hf:/org/name: a recipe with a matrix is several models; name a repository for each"):
        outs(found, Path("hf://org/name"))
    recipe.write_text(textwrap.dedent(MATRIX % "tuned"))
    with pytest.raises(RecipeError, match=r"^out: bits=3 and bits=4 would both be written to tuned; name what differs in it"):
        outs(load_all(recipe, given={"model": "m"}), None)


def test_a_recipe_of_mergekits_has_no_variables(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    with pytest.raises(RecipeError, match="--set bits: mergekit's YAML has no variables"):
        load(tmp_path / "merge.yml", given={"bits": 3})


def test_values_stand_in_names_as_yaml_writes_them() -> None:
    made = expand({"matrix": {"a": [True, None, 0.5]}, "out": "m-$a", "steps": ["$a"]}, Path(), {})
    assert list(made) == ["a=true", "a=null", "a=0.5"]
    assert [(one["out"], one["steps"]) for one in made.values()] == [("m-true", [True]), ("m-null", [None]), ("m-0.5", [0.5])]


def test_names_made_of_odd_values_differ_and_are_no_longer_than_files_may_have(tmp_path: Path) -> None:
    def placed(values: str) -> list[str]:
        steps = "steps: [{quantize: {bits: 4, exclude: [$x]}}]"
        (tmp_path / "odd.yaml").write_text(f"matrix: {{x: {values}}}\ninputs: {{m: m}}\n{steps}\n")
        return [str(place) for place in outs(load_all(tmp_path / "odd.yaml"), Path("new.safetensors")).values()]

    assert placed("['-0.5', '0.5', '[a, b]']") == ["new-x--0.5.safetensors", "new-x-0.5.safetensors", "new-x-a-b.safetensors"]
    with pytest.raises(RecipeError, match="two combinations would be written to new-x-a-b; name outputs in the recipe"):
        placed("['a b', 'a:b']")
    with pytest.raises(RecipeError, match="the values of the matrix are too long to stand in names"):
        placed(f"[{'a' * 300}]")
