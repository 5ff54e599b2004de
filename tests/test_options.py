"""A function's keyword-only parameters are its options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mergekit_plus.errors import OptionError
from mergekit_plus.options import Options, PerModel

Share = Annotated[float, Field(gt=0, le=1, description="share that is kept")]


def blend(
    models: list[float],
    *,
    noise: object = None,
    weight: PerModel[Share] = (0.5,),
    lambda_: Annotated[float, Field(description="scale", allow_inf_nan=False)] = 1.0,
    mode: Annotated[Literal["sum", "mean"], Field(description="how")] = "sum",
    steps: Annotated[int, Field(ge=0, description="how often")],
) -> None:
    """Blend."""


OPTIONS = Options("blend", blend, inside=("noise",))


def test_a_table_tells_all_that_a_user_may_set() -> None:
    found = {name: (option.help, option.default, option.required, option.per_model) for name, option in OPTIONS.table.items()}
    assert found == {
        "weight": ("share that is kept", (0.5,), False, True),
        "lambda": ("scale", 1.0, False, False),
        "mode": ("how", "sum", False, False),
        "steps": ("how often", None, True, False),
    }


def test_a_table_tells_the_names_to_choose_from() -> None:
    assert {name: option.choices for name, option in OPTIONS.table.items() if option.choices} == {"mode": ("sum", "mean")}


def test_values_come_back_as_keyword_arguments_with_the_defaults_filled_in() -> None:
    assert OPTIONS.check({"steps": 3}) == {"weight": (0.5,), "lambda_": 1.0, "mode": "sum", "steps": 3}
    blend([], **OPTIONS.check({"steps": 3, "lambda": 0.2}))


def test_lambda_is_spelt_as_people_spell_it() -> None:
    assert OPTIONS.check({"steps": 1, "lambda": 2})["lambda_"] == 2.0
    assert OPTIONS.problems({"steps": 1, "lambda_": 2}) == ["blend has no option 'lambda_'. Did you mean 'lambda'?"]


@pytest.mark.parametrize(
    ("given", "models", "expected"),
    [(0.25, 3, (0.25, 0.25, 0.25)), ([0.25], 2, (0.25, 0.25)), ([0.1, 0.2], 2, (0.1, 0.2)), ((0.1, 0.2), 2, (0.1, 0.2)), (0.25, None, (0.25,))],
)
def test_one_value_goes_to_all_models_and_several_to_each(given: Any, models: int | None, expected: tuple[float, ...]) -> None:
    assert OPTIONS.check({"steps": 1, "weight": given}, models)["weight"] == expected


def test_a_default_goes_to_all_models_too() -> None:
    assert OPTIONS.check({"steps": 1}, 3)["weight"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({}, ["blend needs the option 'steps': how often"]),
        ({"steps": 1, "weight": [0.1, 0.2, 0.3]}, ["blend: weight has 3 values for 2 models; give one, or one for each"]),
        ({"steps": 1, "weight": []}, ["blend: weight has 0 values for 2 models; give one, or one for each"]),
        ({"steps": 1, "weight": [0.1, 50]}, ["blend: weight=[0.1, 50]: Input should be less than or equal to 1"]),
        ({"steps": 1, "weight": ["a", 50, "b"]}, [
            "blend: weight=['a', 50, 'b']: Input should be a valid number, unable to parse string as a number",
            "blend: weight=['a', 50, 'b']: Input should be less than or equal to 1",
            "blend: weight has 3 values for 2 models; give one, or one for each"]),
        ({"steps": 1, "weight": 0}, ["blend: weight=0: Input should be greater than 0"]),
        ({"steps": 1.5}, ["blend: steps=1.5: Input should be a valid integer, got a number with a fractional part"]),
        ({"steps": 1, "mode": "max"}, ["blend: mode='max': Input should be 'sum' or 'mean'"]),
        ({"steps": 1, "lambda": float("nan")}, ["blend: lambda=nan: Input should be a finite number"]),
        ({"steps": 1, "noise": 3}, ["blend has no option 'noise'. Known: weight, lambda, mode, steps."]),
        ({"steps": 1, "xyz": 3}, ["blend has no option 'xyz'. Known: weight, lambda, mode, steps."]),
        ({"step": 1, "wieght": 0.5, "weight": [0.5] * 5, "mode": 4}, [
            "blend has no option 'step'. Did you mean 'steps'?", "blend has no option 'wieght'. Did you mean 'weight'?",
            "blend: mode=4: Input should be 'sum' or 'mean'", "blend needs the option 'steps': how often",
            "blend: weight has 5 values for 2 models; give one, or one for each"]),
    ],
)  # fmt: skip
def test_every_problem_is_a_sentence_and_all_are_told_at_once(given: dict[str, Any], problems: list[str]) -> None:
    assert OPTIONS.problems(given, 2) == problems
    with pytest.raises(OptionError) as caught:
        OPTIONS.check(given, 2)
    assert str(caught.value) == "; ".join(problems)
