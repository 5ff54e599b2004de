"""Slices: which layer of which model comes where, and what config.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit_toys import BIASES, EMBEDDING, HEAD, NORM, SHAPES, ends, layers, llama, result_of, value

from mergekit_plus.errors import CheckpointError, RecipeError

Source = dict[str, Any]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models a and b of four layers where one stands."""
    monkeypatch.chdir(tmp_path)
    llama("a", 1)
    llama("b", 2)


def source(model: str, first: int, end: int, **parameters: Any) -> Source:
    return {"model": model, "layer_range": [first, end], "parameters": parameters}


def stacked(*slices: Source | list[Source], method: str = "passthrough", **keys: Any) -> dict[str, Any]:
    """A document of slices, each one source or several."""
    return {"merge_method": method, "slices": [{"sources": part if isinstance(part, list) else [part]} for part in slices], **keys}


def test_layers_are_stacked_in_the_order_of_the_slices() -> None:
    result = result_of(stacked(source("a", 0, 3), source("b", 1, 4)))
    assert layers(result) == [100, 101, 102, 201, 202, 203]
    assert result.config["num_hidden_layers"] == 6


def test_layers_may_overlap_and_come_back() -> None:
    result = result_of(stacked(source("a", 0, 3), source("a", 1, 3), source("a", 0, 1)))
    assert layers(result) == [100, 101, 102, 101, 102, 100]


def test_what_stands_before_the_layers_is_the_first_slice_s_and_what_stands_after_the_last_s() -> None:
    assert ends(result_of(stacked(source("a", 0, 3), source("b", 1, 4)))) == {EMBEDDING: 150, NORM: 260, HEAD: 270}


def test_a_slice_of_no_layers_gives_its_embeddings_or_its_head() -> None:
    result = result_of(stacked(source("b", 0, 0), source("a", 0, 4), source("b", 4, 4)))
    assert layers(result) == [100, 101, 102, 103]
    assert ends(result) == {EMBEDDING: 250, NORM: 260, HEAD: 270}
    assert layers(result_of(stacked(source("a", 0, 2), source("b", 1, 1), source("a", 2, 3)))) == [100, 101, 102]


def test_slices_may_have_different_numbers_of_sources_and_the_last_one_s_all_go_into_the_head() -> None:
    """mergekit takes as many for the head as the first slice has."""
    both = [source("a", 2, 4, weight=1), source("b", 2, 4, weight=3)]
    result = result_of(stacked(source("a", 0, 2, weight=1), both, method="linear"))
    assert layers(result) == [100, 101, 177, 178]
    assert ends(result) == {EMBEDDING: 150, NORM: 235, HEAD: 245}


def test_one_model_may_be_in_a_slice_twice() -> None:
    """mergekit refuses it; each source has its own parameters here, and the first is the base."""
    twice = [source("a", 0, 2, weight=3), source("a", 2, 4, weight=1)]
    assert layers(result_of(stacked(twice, method="linear"))) == [100.5, 101.5]
    assert layers(result_of(stacked([source("a", 0, 2), source("a", 2, 4, weight=0.5)], method="task_arithmetic", base_model="a"))) == [101, 102]


def test_a_slice_may_have_a_base_of_its_own() -> None:
    document = stacked([source("a", 0, 1), source("b", 0, 1)], [source("a", 1, 2), source("b", 1, 2)], method="task_arithmetic", base_model="a")
    document["slices"][1]["base_model"] = "b"
    assert layers(result_of({**document, "parameters": {"weight": 0.25}})) == [125, 176]


def test_a_tied_model_gives_its_embeddings_as_a_head_where_another_has_one() -> None:
    llama("tied", 3, tied=True)
    result = result_of(stacked(source("a", 0, 2), source("tied", 2, 4)))
    assert ends(result) == {EMBEDDING: 150, NORM: 360, HEAD: 350}
    assert result.config["tie_word_embeddings"] is False
    turned = result_of(stacked(source("tied", 0, 2), source("a", 2, 4)))
    assert ends(turned) == {EMBEDDING: 350, NORM: 160, HEAD: 170}
    assert turned.config["tie_word_embeddings"] is False
    merged = result_of(stacked([source("tied", 0, 4, weight=1), source("a", 0, 4, weight=1)], method="linear"))
    assert ends(merged) == {EMBEDDING: 250, NORM: 260, HEAD: 260}
    alone = result_of(stacked(source("tied", 0, 2), source("tied", 2, 4)))
    assert HEAD not in alone.specs
    assert alone.config["tie_word_embeddings"] is True


def test_lists_of_config_json_that_go_by_layers_follow_them() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    llama("q", 3, **qwen)
    _with_qwen_biases("q")
    result = result_of(stacked(source("q", 0, 2), source("q", 1, 4)))
    assert result.config["layer_types"] == [kinds[layer] for layer in (0, 1, 1, 2, 3)]
    assert result.config["num_hidden_layers"] == 5


def _with_qwen_biases(name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{name}/model.safetensors")
    tensors |= {f"model.layers.{layer}.{key}": torch.zeros(shape) for layer in range(4) for key, shape in BIASES.items() if "o_proj" not in key}
    save_file(tensors, f"{name}/model.safetensors", metadata={"format": "pt"})


def test_a_bare_file_is_sliced_by_the_names_of_its_tensors() -> None:
    Path("a/config.json").unlink()
    Path("b/config.json").unlink()
    result = result_of(stacked(source("a/model.safetensors", 1, 2), source("b/model.safetensors", 0, 2)))
    assert layers(result) == [101, 200, 201]
    assert ends(result) == {EMBEDDING: 150, NORM: 260, HEAD: 270}
    assert result.files == {}


def test_transformers_loads_a_stack(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mergekit_plus.checkpoint import save

    save(result_of(stacked(source("a", 0, 3), source("b", 1, 4))), tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert [layer.mlp.up_proj.weight[0, 0].item() for layer in model.model.layers] == [100, 101, 102, 201, 202, 203]


def test_every_tensor_of_a_layer_that_is_taken_is_there() -> None:
    llama("biased", 3, bias=True)
    result = result_of(stacked(source("biased", 2, 4)))
    expected = {f"model.layers.{layer}.{key}" for layer in range(2) for key in (*SHAPES, *BIASES)}
    assert result.specs.keys() == {*expected, EMBEDDING, NORM, HEAD}
    assert value(result, "model.layers.1.self_attn.o_proj.bias") == 303


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (stacked(source("a", 0, 5)), r"layer_range \[0, 5\]: a has 4 layers"),
        (stacked([source("a", 0, 1), {"model": "b", "layer_range": [0, 1]}], method="ties", base_model="c"), "base_model c is not among the sources"),
        (stacked([source("a", 0, 1), source("b", 0, 1)]), "slices.0: passthrough merges 1 model, not 2"),
        (stacked([source("a", 0, 1), source("b", 0, 2)], method="linear"), "the sources of a slice must have as many layers each, not 1, 2"),
        (stacked(source("a", 3, 1)), r"slices.0.sources.0.layer_range: give the first layer and the one after the last, as in \[0, 8\]"),
        (stacked(source("a", -1, 1)), "layer_range: give the first layer"),
        (stacked([source("a", 0, 1), source("b", 0, 1)], [source("a", 1, 2), source("b", 1, 2)], method="pcb", base_model="a"),
         "pcb measures whole models, and slices and modules would be measured each alone"),
        ({"merge_method": "passthrough", "modules": {"text_decoder": {"slices": [{"sources": [source("a", 0, 1)]}]}}},
         "a has no module 'text_decoder'. It is in one piece"),
    ],
)  # fmt: skip
def test_slices_that_cannot_be_are_refused(document: dict[str, Any], problem: str) -> None:
    with pytest.raises((RecipeError, CheckpointError), match=problem):
        result_of(document)


def test_everything_wrong_with_slices_is_told_at_once() -> None:
    """A stray key, an option that is none, a value that cannot be, ranges of different lengths, a dtype that is none."""
    wrong = [source("a", 0, 4), source("b", 0, 9, wieght=1, density=[0.5, 1.5])]
    with pytest.raises(RecipeError) as caught:
        result_of(stacked(wrong, method="ties", base_model="a", dtype="bf16", normalise=True))
    for problem in ("unknown key 'normalise'", "no option 'wieght'", "density=1.5: Input", "as many layers each, not 4, 9", "unknown dtype 'bf16'"):
        assert problem in str(caught.value)


def test_layers_that_the_architecture_does_not_have_at_their_new_place_are_refused() -> None:
    """A layer of biases among layers without: config.json has one key for all of them."""
    llama("biased", 3, bias=True)
    with pytest.raises(CheckpointError, match="the slices do not make a model: model.layers.2.self_attn.k_proj.bias has no place in LlamaForCausalLM"):
        result_of(stacked(source("a", 0, 2), source("biased", 2, 4)))
    with pytest.raises(CheckpointError, match="the slices do not make a model: model.layers.2.self_attn.q_proj.bias is missing"):
        result_of(stacked(source("biased", 0, 2), source("a", 2, 4)))


def test_a_config_json_that_does_not_say_how_many_layers_there_are_cannot_be_changed() -> None:
    said = json.loads(Path("a/config.json").read_text())
    Path("a/config.json").write_text(json.dumps({**said, "model_type": "unheard-of", "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="a: config.json does not speak of 4 layers, so it cannot say that there are 2"):
        result_of(stacked(source("a", 0, 2)))
    assert layers(result_of(stacked(source("a", 0, 4)))) == [100, 101, 102, 103]
