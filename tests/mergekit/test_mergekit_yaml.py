"""mergekit's YAML gives what mergekit gives, and what it cannot mean here is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import RecipeError
from mergekit_plus.recipe import build, load, run
from mergekit_plus.steps import Execution

NAMES = ("base", "a", "b")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The folders base, a and b where one stands; their one weight in float64."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name in NAMES:
        noise = torch.randn(16, 24, generator=generator)
        tensors[name] = noise if name == "base" else tensors["base"] + 0.1 * noise
        made = Checkpoint.from_tensors({"w.weight": tensors[name]})
        save(Checkpoint(name, made.source, {"config.json": b'{"dtype": "float32"}', "tokenizer.json": name.encode()}), tmp_path / name)
    return {name: tensor.double() for name, tensor in tensors.items()}


def result_of(config: dict[str, Any]) -> Checkpoint:
    Path("config.yml").write_text(yaml.safe_dump(config))
    return build(load(Path("config.yml"))).result


def entries(*names: str, **parameters: list[float]) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {key: values[index] for key, values in parameters.items()}} for index, name in enumerate(names)]


def close(result: Checkpoint, expected: Tensor) -> None:
    torch.testing.assert_close(result.read("w.weight").double(), expected, rtol=1e-6, atol=1e-7)


# ---- the values of mergekit 0.1.5, in float64 ----


def test_linear_divides_by_the_weights_unless_told_not_to(models: dict[str, Tensor]) -> None:
    config = {"merge_method": "linear", "models": entries("a", "b", weight=[3, 2])}
    close(result_of(config), (3 * models["a"] + 2 * models["b"]) / 5)
    close(result_of({**config, "parameters": {"normalize": False}}), 3 * models["a"] + 2 * models["b"])


def test_a_model_s_own_parameter_goes_before_the_common_one(models: dict[str, Tensor]) -> None:
    config = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 3}}, {"model": "b"}], "parameters": {"weight": 1}}
    close(result_of(config), (3 * models["a"] + models["b"]) / 4)


@pytest.mark.parametrize("listed", [("base", "b"), ("b", "base"), ("b",)])
def test_slerp_goes_from_the_base_whether_or_not_and_wherever_it_is_listed(models: dict[str, Tensor], listed: tuple[str, ...]) -> None:
    config = {"merge_method": "slerp", "base_model": "base", "models": [{"model": name} for name in listed], "parameters": {"t": 0.3}}
    base, other = models["base"], models["b"]
    angle = math.acos(float((base * other).sum() / base.norm() / other.norm()))
    close(result_of(config), (math.sin(0.7 * angle) * base + math.sin(0.3 * angle) * other) / math.sin(angle))


@pytest.mark.parametrize("listed", [False, True])
def test_task_arithmetic_adds_weighted_differences_to_the_base(models: dict[str, Tensor], listed: bool) -> None:
    tuned = entries("a", "b", weight=[0.6, 0.3])
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "base"}, *tuned] if listed else tuned}
    expected = models["base"] + 0.6 * (models["a"] - models["base"]) + 0.3 * (models["b"] - models["base"])
    close(result_of(config), expected)


def ties(models: dict[str, Tensor], weights: tuple[float, float], density: tuple[float, float], normalize: bool, scale: float = 1.0) -> Tensor:
    """As mergekit: keep int(density * n) of each difference, elect the sign of the weighted sum, merge those that agree."""
    terms, votes = [], []
    for name, weight, share in zip("ab", weights, density, strict=True):
        vector = models[name] - models["base"]
        kept = vector.abs().flatten().sort(descending=True).values[int(share * vector.numel()) - 1]
        terms.append(weight * vector * (vector.abs() >= kept))
        votes.append(weight * (vector.abs() >= kept))
    sign = torch.where(terms[0] + terms[1] >= 0, 1.0, -1.0)
    agree = [term.sign() == sign for term in terms]
    total = terms[0] * agree[0] + terms[1] * agree[1]
    divisor = votes[0] * agree[0] + votes[1] * agree[1]
    return models["base"] + scale * (total / torch.where(divisor == 0, 1.0, divisor) if normalize else total)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_elects_and_merges(models: dict[str, Tensor], normalize: bool) -> None:
    parameters = {"normalize": normalize, "int8_mask": True, "lambda": 0.8}
    listed = [{"model": "base"}, *entries("a", "b", weight=[0.6, 0.3], density=[0.5, 0.25])]
    config = {"merge_method": "ties", "base_model": "base", "models": listed, "parameters": parameters}
    close(result_of(config), ties(models, (0.6, 0.3), (0.5, 0.25), normalize, 0.8))
    plain = {"merge_method": "ties", "base_model": "base", "models": entries("a", "b", weight=[0.6, 0.3]), "parameters": {"density": 0.5}}
    close(result_of(plain), ties(models, (0.6, 0.3), (0.5, 0.5), True))


def test_dtype_rounds_the_inputs_and_out_dtype_the_result(models: dict[str, Tensor]) -> None:
    config = {"merge_method": "linear", "models": entries("a", "b", weight=[1, 1])}
    low = [models[name].bfloat16().double() for name in "ab"]
    for dtypes, start, end in (
        ({"dtype": "bfloat16"}, low, torch.bfloat16),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, low, torch.float32),
        ({"dtype": "float32", "out_dtype": "float16"}, [models["a"], models["b"]], torch.float16),
        ({}, [models["a"], models["b"]], torch.float32),
    ):
        result = result_of({**config, **dtypes})
        expected = ((start[0] + start[1]) / 2).to(end)
        assert result.read("w.weight").dtype == end
        assert result.config == {"dtype": str(end).removeprefix("torch.")}
        torch.testing.assert_close(result.read("w.weight"), expected, rtol=0, atol=torch.finfo(end).eps)


def test_the_tokenizer_is_the_base_s_or_the_first_model_s(models: dict[str, Tensor]) -> None:
    config = {"merge_method": "linear", "models": entries("a", "base", "b", weight=[1, 1, 1])}
    assert result_of(config).file("tokenizer.json") == b"a"
    assert result_of({**config, "base_model": "base"}).file("tokenizer.json") == b"base"


def test_a_base_that_the_method_does_not_know_is_one_more_model_and_must_have_its_weight(models: dict[str, Tensor]) -> None:
    config = {"merge_method": "linear", "base_model": "base", "models": entries("a", "b", weight=[1, 2]), "parameters": {"weight": 3}}
    close(result_of(config), (models["a"] + 2 * models["b"] + 3 * models["base"]) / 6)
    with pytest.raises(RecipeError, match="base_model base would be merged as one more model, and nothing says its weight; list it with its own"):
        result_of({**config, "parameters": {}})


def test_the_output_holds_a_recipe_of_ours_that_gives_the_same(models: dict[str, Tensor], tmp_path: Path) -> None:
    listed = [{"model": "base"}, *entries("a", "b", weight=[0.6, 0.3])]
    config = {"merge_method": "dare_ties", "base_model": "base", "models": listed, "parameters": {"density": 0.5}, "dtype": "bfloat16"}
    Path("config.yml").write_text(yaml.safe_dump(config))
    run(load(Path("config.yml")), Execution(out=tmp_path / "out"))
    run(load(tmp_path / "out" / "recipe.yaml"), Execution(out=tmp_path / "again"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_model_without_parameters_may_say_so_with_nothing(models: dict[str, Tensor]) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: base\n    parameters:\n  - model: a\n    parameters:\nparameters:\n"
    Path("config.yml").write_text(text)
    close(build(load(Path("config.yml"))).result, models["a"])


# ---- what is refused ----


TIES = {"merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({**TIES, "models": entries("a", "b", desnity=[1, 1], wieght=[1, 1])}, [
            f"models.{number}.parameters: ties has no option '{wrong}'. Did you mean '{right}'?"
            for number in (0, 1) for wrong, right in (("desnity", "density"), ("wieght", "weight"))]),
        ({**TIES, "models": [{"model": "a", "paramaters": {}}], "paramters": {}, "parameters": {"densty": 1, "weight": "much"}}, [
            "models.0: unknown key 'paramaters'. Did you mean 'parameters'?", "unknown key 'paramters'. Did you mean 'parameters'?",
            "parameters: ties has no option 'densty'. Did you mean 'density'?",
            "parameters: ties: weight='much': Input should be a valid number, unable to parse string as a number"]),
        ({"merge_method": "tise", "models": [{"model": "a"}], "dtype": "bfloat61"}, [
            "dtype: unknown dtype 'bfloat61'. Did you mean 'bfloat16'?", "unknown merge method 'tise'. Did you mean 'ties'?"]),
        ({**TIES, "models": [{"model": "a"}], "out_dtype": "bf16"}, ["out_dtype: unknown dtype 'bf16'. Did you mean 'bfloat16'?"]),
        ({"merge_method": "ties", "models": [{"model": "a"}]}, ["models: ties needs the model that the others start from: give it as base_model"]),
        ({**TIES, "models": [{"model": "base"}]}, ["models: there is none besides the base model"]),
        ({**TIES, "models": [{"model": "a"}, {"model": "b"}, {"model": "a"}]}, ["models: the same model is listed twice"]),
        ({**TIES, "models": [{"model": "a"}], "slices": [], "modules": {"x": {}}}, [
            "give exactly one of models, slices and modules", "modules.x: give either models or slices"]),
        (TIES, ["give exactly one of models, slices and modules"]),
        ({**TIES, "models": [{"model": "a"}], "tokenizer": {"source": "base"}, "tokenizer_source": "base"}, ["give either tokenizer or tokenizer_source"]),
        ({**TIES, "models": [{"model": "a"}], "chat_template": "chatlm"}, [
            "chat_template 'chatlm' is neither Jinja text nor a name. Did you mean 'chatml'?"]),
        ({**TIES, "models": [{"model": "a", "parameters": {"density": 50}}]}, [
            "models.0.parameters: ties: density=50: Input should be less than or equal to 1"]),
        ({**TIES, "models": [{"model": "a"}], "parameters": {"density": [{"filter": "mlp", "value": [1, -1]}, {"value": 0.5}]}}, [
            "parameters: ties: density=-1: Input should be greater than 0"]),
        ({**TIES, "models": [{"model": "a"}], "parameters": {"density": [{"filter": "mlp", "valeu": 1}]}}, [
            "parameters.density.0: unknown key 'valeu'. Did you mean 'value'?", "parameters.density.0.value: Field required"]),
        ({**TIES, "models": [{"model": "a", "parameters": {"lambda": 0.5}}]}, [
            "models.0.parameters: 'lambda' is one for all models; write it under the parameters of the slice or the document"]),
        ({"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 5}}, [
            "parameters: slerp: t=5: Input should be less than or equal to 1"]),
        ({"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}]}, [
            "models: slerp goes from one model to another: give two models, or a base and one model, not 2 and a base"]),
        ({"merge_method": "linear", "models": entries("a", "b", weight=[1, -1])}, [
            "models: weight: 1, -1 sum to zero, so they cannot be normalized; set normalize to false, or other weights"]),
        ({**TIES, "models": [{"model": {"path": "a"}}]}, [
            "models.0.model: a model is a path, org/name[@revision], or a table of model, lora and override_architecture, not {'path': 'a'}"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_all_at_once(tmp_path: Path, config: dict[str, Any], problems: list[str]) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {'; '.join(problems)}"


def test_lenient_warns_of_what_mergekit_ignores_and_still_refuses_what_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    stray = {**TIES, "models": [{"model": "a", "parameters": {"weight": {"value": 1, "note": "mine"}, "lambda": 2}}], "normalize": True}
    path.write_text(yaml.safe_dump(stray))
    with pytest.warns(UserWarning, match="It is ignored") as warned:
        recipe = load(path, lenient=True)
    said = [str(warning.message).removeprefix(f"{path}: ") for warning in warned]
    assert said == [
        "models.0.parameters.weight.0: unknown key 'note'. Known: value, filter. It is ignored.",
        "normalize is an option of ties: write it under `parameters`. It is ignored.",
        "models.0.parameters: 'lambda' is one for all models; write it under the parameters of the slice or the document. It is ignored.",
    ]
    assert recipe.steps[0]["mergekit"].model_dump() == {**TIES, "models": [{"model": "a", "parameters": {"weight": {"value": 1}}}]}
    path.write_text(yaml.safe_dump({**stray, "parameters": {"density": 50}}))
    with pytest.raises(RecipeError, match="density=50"), pytest.warns(UserWarning, match="It is ignored"):
        load(path, lenient=True)
