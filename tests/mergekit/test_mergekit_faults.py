"""What mergekit 0.1.5 does wrong in silence, one test for each: here it is right, or refused.

BERT, which mergekit cannot merge, is in test_modules.py; the head that follows only some sources of the last slice, and one model twice in a slice, are in
test_slices.py; paths with a plus in test_documents.py; ties at the cut of TIES in tests/merge/test_ties.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit_toys import BIASES, HEAD, ends, llama, result_of, value
from safetensors.torch import load_file, save_file

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, RecipeError
from mergekit_plus.recipe import load, run
from mergekit_plus.steps import Execution


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mean(*models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models], **keys}


def changed(model: str, **tensors: torch.Tensor) -> None:
    """Put these tensors into a model."""
    path = Path(model) / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def test_completeness_the_biases_of_a_llama_with_attention_bias_are_merged() -> None:
    llama("a", 1, bias=True)
    llama("b", 2, bias=True)
    result = result_of(mean("a", "b"))
    assert len(result.specs) == len(load_file("a/model.safetensors")) == 55
    assert [value(result, f"model.layers.3.{key}") for key in BIASES] == [153] * 4


def test_a_quantised_input_is_refused() -> None:
    llama("a", 1)
    llama("b", 2)
    name = "model.layers.0.mlp.up_proj.weight"
    changed("a", **{name: torch.ones(6, 4).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)})
    with pytest.raises(CheckpointError, match=r"a is quantized already \(model.layers.0.mlp.up_proj.weight_scale_inv\); use the unquantized model"):
        result_of(mean("a", "b", dtype="bfloat16"))


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_nan_in_an_input_is_refused_with_the_name_of_the_tensor(method: str) -> None:
    llama("a", 1)
    llama("b", 2)
    changed("b", **{HEAD: torch.full((8, 4), float("nan"))})
    document = mean("a", "b") if method == "linear" else {"merge_method": method, "slices": [{"sources": [{"model": "b", "layer_range": [0, 2]}]}]}
    with pytest.raises(CheckpointError, match="b: lm_head.weight holds 32 values that are NaN or infinite"):
        save(result_of(document), Path("out"))


def test_weights_that_sum_to_nothing_are_refused() -> None:
    weights = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": -0.5}}]
    with pytest.raises(RecipeError, match="weight: 0.5, -0.5 sum to zero"):
        result_of({"merge_method": "linear", "models": weights})


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"parameters": {"desnity": 0.5}}, "no option 'desnity'. Did you mean 'density'"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "no option 'wieght'. Did you mean 'weight'"),
        ({"models": [{"model": "a", "paramaters": {"weight": 1}}]}, "unknown key 'paramaters'. Did you mean 'parameters'"),
        ({"normalize": False}, "normalize is an option of ties: write it under `parameters`"),
        ({"models": [{"model": "a", "weight": 1}]}, "models.0.weight is an option of ties: write it under `parameters`"),
        ({"parameters": {"density": 50}}, "density=50: Input should be less than or equal to 1"),
        ({"parameters": {"density": -1}}, "density=-1: Input should be greater than 0"),
        ({"merge_method": "slerp", "parameters": {"t": 5}}, "t=5: Input should be less than or equal to 1"),
        ({"dtype": "int64"}, "dtype: unknown dtype 'int64'"),
    ],
)
def test_typos_keys_at_the_wrong_level_and_impossible_values_are_refused(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        result_of({"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}], **document})


def test_a_range_of_layers_that_goes_backwards_is_refused() -> None:
    with pytest.raises(RecipeError, match="layer_range: give the first layer and the one after the last"):
        result_of({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]})


def test_without_a_base_model_config_and_tokenizer_are_the_first_model_s() -> None:
    for number, name in enumerate("abcdef"):
        llama(name, number, rope_theta=number + 1.0)
    for first in "fa":
        others = [name for name in "abcdef" if name != first]
        assert result_of(mean(first, *others)).config["rope_theta"] == "abcdef".index(first) + 1
    assert result_of(mean(*"abc", base_model="c")).config["rope_theta"] == 3


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b = ((torch.randn(100, 100, generator=generator) * 0.02).bfloat16() for _ in range(3))
    for name, tensor in {"base": base, "a": a, "b": b}.items():
        save_file({"w.weight": tensor}, f"{name}.safetensors")
    models = [{"model": "a.safetensors", "parameters": {"weight": 0.7}}, {"model": "b.safetensors", "parameters": {"weight": 0.45}}]
    result = result_of({"merge_method": "task_arithmetic", "base_model": "base.safetensors", "models": models}).read("w.weight")
    exact = base.double() + 0.7 * (a.double() - base.double()) + 0.45 * (b.double() - base.double())
    error, least = (result.double() - exact).abs(), (exact.to(torch.bfloat16).double() - exact).abs()
    assert (error <= least + 1e-8).all()  # a number halfway between two may go either way; mergekit has 26 in a thousand wrong


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_float16_does_not_overflow_where_a_tensor_is_rescaled(method: str) -> None:
    """The sum of all magnitudes is far beyond float16's largest number."""
    for name, size in {"base": 0.0, "a": 20.0}.items():
        save_file({"w.weight": torch.full((100, 100), size, dtype=torch.float16)}, f"{name}.safetensors")
    parameters = {"density": 0.5, "rescale": True}
    document = {"merge_method": method, "base_model": "base.safetensors", "models": [{"model": "a.safetensors"}], "parameters": parameters}
    result = result_of(document).read("w.weight")
    assert result.dtype == torch.float16
    assert result.unique().numel() == 2  # what was dropped, and what was kept and made up for it
    assert result.double().mean().item() == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"out_dtype": "float16"}, {"dtype": "float32", "out_dtype": "bfloat16"}])
def test_tensors_have_the_dtype_that_was_asked_for_and_config_json_says_so(keys: dict[str, str]) -> None:
    llama("a", 1)
    llama("b", 2)
    wanted = keys.get("out_dtype", keys.get("dtype"))
    slices = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in "ab"]
    for document in (mean("a", "b", **keys), {"merge_method": "passthrough", "slices": slices, **keys}):
        result = result_of(document)
        assert {str(result.read(name).dtype) for name in result.specs} == {f"torch.{wanted}"}
        assert result.config["dtype"] == wanted


@pytest.mark.parametrize("order", ["tied plain", "plain tied"])
def test_tied_and_untied_models_make_an_untied_one(order: str) -> None:
    llama("tied", 1, tied=True)
    llama("plain", 3)
    result = result_of(mean(*order.split()))
    assert list(ends(result).values()) == [250, 260, 260]
    assert result.config["tie_word_embeddings"] is False


def test_the_experts_of_a_layer_keep_the_names_of_the_published_layout(tmp_path: Path) -> None:
    from tiny import tiny_model

    model = tiny_model("Qwen3MoeForCausalLM", tmp_path)
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in model.specs
    assert result_of(mean("Qwen3MoeForCausalLM", "./Qwen3MoeForCausalLM")).specs == model.specs
    slices = [{"sources": [{"model": "Qwen3MoeForCausalLM", "layer_range": part}]} for part in ([0, 2], [1, 2])]
    stacked = result_of({"merge_method": "passthrough", "slices": slices})
    assert torch.equal(stacked.read("model.layers.2.mlp.experts.1.up_proj.weight"), model.read("model.layers.1.mlp.experts.1.up_proj.weight"))


def test_what_an_earlier_run_wrote_does_not_stay_beside_the_output() -> None:
    llama("a", 1)
    llama("b", 2)
    Path("file.yaml").write_text(yaml.safe_dump(mean("a", "b")))
    run(load(Path("file.yaml")), Execution(SaveOptions(max_shard_size=2000), out=Path("out")))
    assert "model.safetensors.index.json" in os.listdir("out")
    run(load(Path("file.yaml")), Execution(SaveOptions(overwrite=True), out=Path("out")))
    assert sorted(os.listdir("out")) == ["README.md", "config.json", "manifest.json", "model.safetensors", "recipe.yaml"]
    assert json.loads(Path("out/config.json").read_text()) == Checkpoint.open("a").config
