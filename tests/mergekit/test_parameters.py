"""Filters, gradients and scopes: what a parameter is for one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mergekit_toys import HEAD, ends, layers, llama, result_of, value

from mergekit_plus.errors import OptionError
from mergekit_plus.mergekit.parameters import at


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models a and b of four layers where one stands; theirs differ by 100 everywhere."""
    monkeypatch.chdir(tmp_path)
    llama("a", 1)
    llama("b", 2)


def moved(**parameters: Any) -> dict[str, Any]:
    """From a towards b: the result is a plus 100 times the weight."""
    return {"merge_method": "task_arithmetic", "base_model": "a", "models": [{"model": "b"}], "parameters": parameters}


@pytest.mark.parametrize(
    ("points", "t", "result"),
    [([0, 1], 0.25, 0.25), ([0, 0.5, 1], 0.5, 0.5), ([0, 1, 0], 0.75, 0.5), ([3], 0.7, 3), ([1, 2], 1, 2), (["1e-1", 1], 0, 0.1), (7, 0.3, 7)],
)
def test_a_gradient_goes_in_a_straight_line_from_point_to_point(points: Any, t: float, result: float) -> None:
    assert at(points, t) == pytest.approx(result)


@pytest.mark.parametrize(("points", "t", "result"), [([True, False], 0.5, True), ([True, False], 1, False), (["x", "y", "z"], 0.9, "y"), ([0, 1], 0.9, 0)])
def test_of_words_and_truth_values_the_one_begun_is_taken(points: list[Any], t: float, result: object) -> None:
    assert at(points, t, discrete=True) == result


def test_a_gradient_begins_with_the_first_layer_and_ends_with_the_last() -> None:
    assert layers(result_of(moved(weight=[0, 0.3]))) == pytest.approx([100, 111, 122, 133])


def test_what_is_in_no_layer_has_the_first_value_of_a_gradient_the_head_too() -> None:
    assert set(ends(result_of(moved(weight=[0.25, 1]))).values()) == {150 + 25, 160 + 25, 170 + 25}


def test_the_first_filter_that_is_part_of_a_name_decides() -> None:
    weight = [{"filter": "mlp", "value": 0.5}, {"filter": "up_proj", "value": 0.1}, {"filter": "lm_head", "value": [0.75, 1]}, {"value": 0}]
    result = result_of(moved(weight=weight))
    assert layers(result) == [150, 151, 152, 153]
    assert layers(result, "self_attn.q_proj.weight") == [100, 101, 102, 103]
    assert value(result, HEAD) == 245
    for everything in ("*", None):
        assert layers(result_of(moved(weight=[{"filter": everything, "value": 0.5}, {"filter": "mlp", "value": 0}]))) == [150, 151, 152, 153]


def test_where_no_filter_fits_the_next_scope_speaks_then_the_default() -> None:
    document = moved(weight=[{"filter": "mlp", "value": 0.25}])
    document["models"][0]["parameters"] = {"weight": {"filter": "q_proj", "value": 0.5}}
    result = result_of(document)
    assert layers(result, "self_attn.q_proj.weight") == [150, 151, 152, 153]
    assert layers(result, "mlp.up_proj.weight") == [125, 126, 127, 128]
    assert layers(result, "input_layernorm.weight") == [200, 201, 202, 203]


def test_a_filter_of_one_model_looks_at_that_model_s_name_of_the_tensor() -> None:
    """The second slice's first layer is layer 0 of b, though it becomes layer 2."""
    scale = {"parameters": {"scale": [{"filter": "layers.0.", "value": 0.5}, {"value": 1}]}}
    slices = [{"sources": [{"model": "a", "layer_range": [1, 3], **scale}]}, {"sources": [{"model": "b", "layer_range": [0, 2], **scale}]}]
    assert layers(result_of({"merge_method": "passthrough", "slices": slices})) == [101, 102, 100, 201]


def test_each_slice_goes_through_the_gradient_once_and_a_slice_of_one_layer_is_at_its_end() -> None:
    sources = [[{"model": name, "layer_range": range_} for name in "ab"] for range_ in ([0, 2], [2, 3])]
    document = {"merge_method": "task_arithmetic", "base_model": "a", "slices": [{"sources": part} for part in sources], "parameters": {"weight": [0, 0.5]}}
    assert layers(result_of(document)) == [100, 151, 152]


def test_weights_that_cancel_for_some_tensors_are_refused_with_the_name_of_one() -> None:
    models = [{"model": "a", "parameters": {"weight": [1, 0]}}, {"model": "b", "parameters": {"weight": [1, 0]}}]
    with pytest.raises(OptionError, match=r"model.layers.3.input_layernorm.weight: weight: 0, 0 sum to zero"):
        result_of({"merge_method": "linear", "models": models})


def test_what_a_method_measures_the_whole_model_by_may_not_vary() -> None:
    document = {**moved(ratio=[0.5, 1]), "merge_method": "pcb", "models": [{"model": "b"}]}
    with pytest.raises(OptionError, match="pcb measures the whole model by ratio, which may not vary from tensor to tensor"):
        result_of(document)
