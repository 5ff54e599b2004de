"""What a search may look for: axes from a method's options, with bounds that are known or given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from mergekit_plus.errors import OptionError
from mergekit_plus.merge import METHODS
from mergekit_plus.options import Options, PerModel, SearchRange
from mergekit_plus.search.space import Axis, SearchOptions, parse_axes, values_of

TEXT = Path(__file__).parents[1] / "models" / "text" / "code.val.txt"


def axes(method: str, *names: str, given: dict[str, Any] | None = None, models: int = 2) -> list[Axis]:
    return SearchOptions(options=dict.fromkeys(names), texts={}).axes(METHODS[method], given or {}, models)


def test_an_option_is_searched_in_its_own_range_from_its_default() -> None:
    assert axes("pcb", "lambda", "ratio") == [Axis("lambda", None, 0, 2, 1.0, scale=True), Axis("ratio", None, 0.05, 1, 0.1)]
    assert axes("slerp", "t") == [Axis("t", None, 0, 1, 0.5)]


def test_one_value_for_each_model_is_an_axis_for_each() -> None:
    found = axes("pcb", "lambda:each", "ratio", given={"lambda": [0.5, 3]})
    assert found == [Axis("lambda", 0, 0, 2, 0.5, scale=True), Axis("lambda", 1, 0, 2, 2, scale=True), Axis("ratio", None, 0.05, 1, 0.1)]
    assert values_of(found, [0.3, 0.4, 0.5]) == {"lambda": [0.3, 0.4], "ratio": 0.5}
    assert [axis.start for axis in axes("pcb", "lambda", given={"lambda": [0.5, 1.5]})] == [1.0]


def test_points_along_the_stack_and_kinds_of_layers_are_an_axis_each_and_start_where_the_option_is() -> None:
    points = axes("pcb", "lambda:depth3")
    assert points == [Axis("lambda", "depth", 0, 2, 1.0, scale=True)] * 3
    assert values_of(points, [0.2, 0.4, 0.6]) == {"lambda": {"depth": [0.2, 0.4, 0.6]}}
    kinds = axes("pcb", "ratio", "lambda:kinds", given={"lambda": [0.25, 0.75]})
    assert kinds == [Axis("ratio", None, 0.05, 1, 0.1), *(Axis("lambda", kind, 0, 2, 0.5, scale=True) for kind in ("attention", "mlp", "rest"))]
    assert values_of(kinds, [0.1, 0.2, 0.4, 0.6]) == {"ratio": 0.1, "lambda": {"attention": 0.2, "mlp": 0.4, "rest": 0.6}}
    tables = {"weight": {"depth": [0.25, 0.75]}, "lambda": [{"mlp": 0.5, "rest": 1.5}, 1]}
    assert [axis.start for axis in axes("task_arithmetic", "weight:depth3", given={"weight": tables["weight"]})] == [0.25, 0.5, 0.75]
    assert [axis.start for axis in axes("task_arithmetic", "weight", given={"weight": tables["weight"]})] == [0.5]
    assert [axis.start for axis in axes("pcb", "lambda:kinds", given={"lambda": tables["lambda"]})] == [1.25, 0.75, 1.25]
    assert [axis.start for axis in axes("pcb", "lambda:each", given={"lambda": tables["lambda"]})] == [1, 1]


def test_bounds_that_are_given_hold() -> None:
    found = SearchOptions(options=parse_axes("density=0.1..0.3,weight:each=-1..1"), texts={}).axes(METHODS["ties"], {}, 2)
    assert found == [Axis("density", None, 0.1, 0.3, 0.3), Axis("weight", 0, -1, 1, 1), Axis("weight", 1, -1, 1, 1)]
    with pytest.raises(OptionError, match=r"--search ratio=0\.1-1: write the bounds as ratio=0\.\.1"):
        parse_axes("lambda,ratio=0.1-1")


def test_values_are_short_enough_for_a_recipe_and_whole_where_the_option_counts() -> None:
    assert Axis("lambda", None, 0, 2, 1).at(1 / 3) == 0.6667
    assert Axis("lambda", None, 0, 2, 1).at(1.01) == 2
    assert Axis("steps", None, 1, 10, 1, whole=True).at(0.5) in (5, 6)


def test_where_no_range_is_said_the_least_and_greatest_allowed_values_are_it() -> None:
    def blend(
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.5,
        many: PerModel[Annotated[int, Field(ge=1, le=9)]] = (1,),
        scale: Annotated[float, Field(description="any")] = 1.0,
        near: Annotated[float, Field(gt=0, lt=5), SearchRange(1, 2)] = 1.0,
        flag: bool = False,
    ) -> None: ...

    table = Options("blend", blend).table
    assert {name: (option.number, option.search) for name, option in table.items()} == {
        "share": (float, (0.01, 1)), "many": (int, (1, 9)), "scale": (float, None), "near": (float, (1, 2)), "flag": (None, None)
    }  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
def test_every_range_of_every_method_is_allowed_by_it(name: str) -> None:
    for option in METHODS[name].options.table.values():
        for bound in option.search or ():
            assert option.number is not None
            assert not METHODS[name].options.problems({option.name: bound})


@pytest.mark.parametrize(
    ("method", "changes", "problem"),
    [
        ("pcb", {"options": {"lamda": None}}, "search: pcb has no option 'lamda'. Did you mean 'lambda'?"),
        ("pcb", {"options": {"inter": None}}, "search: inter is no number, so it cannot be searched; pcb has lambda, ratio, winsor"),
        ("ties", {"options": {"normalize": None}}, "search: normalize is no number, so it cannot be searched; ties has weight, density, lambda"),
        ("pcb", {"options": {"ratio:each": None}}, "search: ratio of pcb is one value for all models; leave out ':each'"),
        ("pcb", {"options": {"lambda:each": None, "lambda": None}}, "search: lambda and lambda:each are the same option; name one of them"),
        ("pcb", {"options": {"lambda:kinds": None, "lambda:depth2": None}}, "search: lambda:depth2 and lambda:kinds are the same option; name one of them"),
        ("pcb", {"options": {"lambda:depth1": None}},
         "search: lambda:depth1: after the colon stands each, kinds, or depth and how many points from 2 to 99, as in lambda:depth3"),
        ("pcb", {"options": {"ratio:kinds": None}}, "search: pcb measures the whole model by ratio, which may not vary from layer to layer"),
        ("karcher", {"options": {"max_iter:depth2": None}},
         "search: karcher: max_iter is the same for all layers; only what is measured in fractions may vary"),
        ("pcb", {"options": {"ratio": [0.5, 0.1]}}, "search: ratio=0.5..0.1: the first bound must be below the second"),
        ("pcb", {"options": {"ratio": [0.5, 7]}}, "search: pcb: ratio=7.0: Input should be less than or equal to 1"),
        ("pcb", {"options": {}}, "search: it names no option"),
        ("pcb", {"texts": {}}, "search: it needs `texts` (--text NAME=FILE) to measure models on, validation text that no model was tuned on"),
        ("pcb", {"texts": {"a": "nowhere.txt"}}, "search: the text a is not at nowhere.txt"),
        ("pcb", {"heldout": {"b": "nowhere.txt"}}, "search: the text b is not at nowhere.txt"),
        ("pcb", {"objective": "kl"}, "search: the objective kl needs one text for each model, in the models' order; there are 1 for 2"),
        ("pcb", {"objective": "worst"}, "search: the objective worst needs one text for each model, in the models' order; there are 1 for 2"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused_in_a_sentence(method: str, changes: dict[str, Any], problem: str) -> None:
    spec = SearchOptions.model_validate({"options": {"lambda": None}, "texts": {"code": str(TEXT)}, **changes})
    assert spec.problems(method, {}, ["a", "b"], "base", Path()) == [problem]


def test_the_worst_loss_is_relative_to_a_base() -> None:
    spec = SearchOptions(options={"weight": None}, texts={"code": str(TEXT)}, objective="worst")
    assert spec.problems("linear", {}, ["a"], None, Path()) == ["search: the objective worst is relative to the base's loss; name the base"]
