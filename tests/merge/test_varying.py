"""Options that differ from layer to layer: by depth, by kind of layer, and never otherwise than one value where all are equal."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import BUSY
from merge_toys import near, random

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.merge import METHODS
from mergekit_plus.merge.adapters import adapter_problems
from mergekit_plus.merge.plan import merge, problems
from mergekit_plus.recipe import build, load

IN_LAYERS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHAPES = {
    EMBEDDING: (4, 3), NORM: (3,), HEAD: (4, 3),
    **{f"model.layers.{layer}.{name}": (3,) if "norm" in name else (3, 3) for layer in range(3) for name in IN_LAYERS},
}  # fmt: skip


def full(label: str, value: float) -> Checkpoint:
    """A model of three layers, the same everywhere."""
    return Checkpoint.from_tensors({name: torch.full(shape, float(value)) for name, shape in SHAPES.items()}, label)


def moved(value: Any, *models: float) -> dict[str, float]:
    """From 0 towards models of these values (100) by task arithmetic with such a weight: what every tensor is then."""
    made = merge([full(str(number), number) for number in models or (100,)], "task_arithmetic", full("base", 0), {"weight": value})
    tensors = {name: made.read(name) for name in made.specs}
    assert all((tensor == tensor.flatten()[0]).all() for tensor in tensors.values())
    return {name.removeprefix("model."): float(tensor.flatten()[0]) for name, tensor in tensors.items()}


def test_by_depth_the_value_goes_in_straight_lines_from_the_first_layer_to_the_last_and_stays_outside_of_them() -> None:
    found = moved({"depth": [0.25, 0.75]})
    assert [found[f"layers.{layer}.{name}"] for layer in range(3) for name in IN_LAYERS] == [25] * 3 + [50] * 3 + [75] * 3
    assert (found["embed_tokens.weight"], found["norm.weight"], found["lm_head.weight"]) == (25, 75, 75)
    assert [moved({"depth": [1, 2, 1, 0, 4]})[f"layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [100, 100, 400]
    assert set(moved({"depth": [0.5]}).values()) == {50}


def test_by_kind_attention_and_mlp_have_values_of_their_own_and_norms_and_what_is_in_no_layer_the_rest() -> None:
    found = moved({"attention": 0.25, "mlp": 0.5, "rest": 0.75})
    assert [found[f"layers.{layer}.{name}"] for layer in range(3) for name in IN_LAYERS] == [25, 50, 75] * 3
    assert [found[name] for name in ("embed_tokens.weight", "norm.weight", "lm_head.weight")] == [75] * 3
    assert [moved({"attention": 0.25, "rest": 1})[f"layers.0.{name}"] for name in IN_LAYERS] == [25, 100, 100]


def test_one_model_may_have_a_table_and_another_a_number() -> None:
    found = moved([{"depth": [0, 1]}, 0.5], 100, 10)
    assert [found[f"layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [5, 55, 105]


def test_a_head_that_only_a_model_stores_is_after_the_last_layer() -> None:
    base = Checkpoint.from_tensors({name: torch.zeros(shape) for name, shape in SHAPES.items() if name != HEAD}, "base")
    base = replace(base, files={"config.json": b'{"tie_word_embeddings": true}'})
    made = merge([full("a", 100)], "task_arithmetic", base, {"weight": {"depth": [0, 0.5]}})
    assert made.read(HEAD).unique().tolist() == [50]


def family(count: int) -> list[Checkpoint]:
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(count + 1)]
    for seed, (name, shape) in enumerate(SHAPES.items()):
        start = random(*shape, seed=seed)
        for made, tensor in zip(tensors, (start, *near(start, count, seed=seed)), strict=True):
            made[name] = tensor
    return [Checkpoint.from_tensors(made, str(number)) for number, made in enumerate(tensors)]


def varying_options() -> list[tuple[str, str]]:
    return [
        (name, option.name)
        for name, method in METHODS.items() for option in method.options.table.values()
        if option.number is float and not (method.scope == "model" and option.name in method.measured_by)
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["depth", "kinds"])
@pytest.mark.parametrize(("name", "option"), varying_options())
def test_where_all_values_are_equal_the_result_is_that_of_the_one_value_byte_for_byte(name: str, option: str, form: str) -> None:
    method = METHODS[name]
    base, *models = family(method.models[1] or 2)
    given = dict(BUSY.get(name, {}))
    value = given.get(option, method.options.table[option].default)
    value = float(value[0] if isinstance(value, list | tuple) else value)
    table = {"depth": [value] * 4} if form == "depth" else {"attention": value, "mlp": value, "rest": value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pcb: a model that differs nowhere; neither here
        one, many = (merge(models, name, base if method.takes_base else None, {**given, option: wanted}) for wanted in (value, table))
        assert all(torch.equal(one.read(tensor), many.read(tensor)) for tensor in SHAPES)


def test_pcb_measures_the_whole_model_and_scales_each_tensor_by_its_own_lambda() -> None:
    base, *models = family(2)
    whole = merge(models, "pcb", base, {"ratio": 0.5})
    by_depth = merge(models, "pcb", base, {"ratio": 0.5, "lambda": {"depth": [0, 2]}})
    for layer, scale in enumerate((0, 1, 2)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(by_depth.read(name) - base.read(name), scale * (whole.read(name) - base.read(name)))


WRITE = r"write \{depth: \[first, ..., last\]\} or \{attention: a, mlp: b, rest: c\}, all of them numbers"


@pytest.mark.parametrize(
    ("method", "options", "problem"),
    [
        ("pcb", {"lambda": {"depth": []}}, rf"pcb: lambda=\{{'depth': \[\]\}}: {WRITE}"),
        ("pcb", {"lambda": {"depth": [1, "x"]}}, WRITE),
        ("pcb", {"lambda": {"depth": 1}}, WRITE),
        ("pcb", {"lambda": {"depth": [1], "rest": 1}}, WRITE),
        ("pcb", {"lambda": {"mlp": 1}}, WRITE),
        ("pcb", {"lambda": {"mlp": 1, "rest": float("nan")}}, WRITE),
        ("pcb", {"lambda": {"atention": 1, "rest": 1}}, WRITE),
        ("pcb", {"ratio": {"depth": [0.1, 0.2]}}, "pcb measures the whole model by ratio, which may not vary from layer to layer"),
        ("pcb", {"inter": {"rest": 1}}, "pcb: inter is the same for all layers; only what is measured in fractions may vary"),
        ("pcb", {"lamda": {"rest": 1}}, "pcb has no option 'lamda'. Did you mean 'lambda'"),
        ("ties", {"density": {"depth": [0.5, 0.5, 7]}}, "ties: density=7.0: Input should be less than or equal to 1"),
        ("ties", {"weight": [{"rest": 1}, 1, 1]}, "ties: weight has 3 values for 2 models; give one, or one for each"),
        ("della", {"density": {"mlp": 0.1, "rest": 0.5}, "epsilon": 0.2}, "density"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_is_read(method: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        raise OptionError("".join(problems(method, options, 2, True)))  # of which there is one
    assert len(problems(method, options, 2, True)) == 1
    with pytest.raises(OptionError, match=problem):
        merge([full("a", 1), full("b", 2)], method, full("base", 0), options)


def test_a_model_without_layers_and_adapters_have_nothing_along_which_to_vary() -> None:
    a, b = (Checkpoint.from_tensors({"w": torch.ones(2)}, label) for label in "ab")
    with pytest.raises(CheckpointError, match="b has no stack of layers, so that no option can vary along it or by kind of layer"):
        merge([a], "task_arithmetic", b, {"weight": {"depth": [0, 1]}})
    found = adapter_problems("ties", {"lambda": {"rest": 1}}, 2, None)
    assert found == ["options by depth or kind of layer are for models; adapters are merged with one value"]


def test_a_recipe_says_it_of_all_models_or_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    for label, value in (("base", 0), ("a", 100), ("b", 10)):
        save_file({name: torch.full(shape, float(value)) for name, shape in SHAPES.items()}, f"{label}.safetensors")
    Path("recipe.yaml").write_text(
        "inputs: {base: base.safetensors, a: a.safetensors, b: b.safetensors}\n"
        "steps: [{merge: {method: task_arithmetic, base: base, models: {a: {weight: {depth: [0, 1]}}, b: {}}, lambda: {mlp: 0.5, rest: 1}}}]\n"
    )
    result = build(load(Path("recipe.yaml"))).result
    assert [result.read(f"model.layers.{layer}.mlp.up_proj.weight").mean().item() for layer in range(3)] == [5, 30, 55]
    assert [result.read(f"model.layers.{layer}.self_attn.q_proj.weight").mean().item() for layer in range(3)] == [10, 60, 110]
