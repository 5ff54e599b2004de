"""Models of several modules, and encoders: what transformers saves is what is merged, and transformers loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit_toys import result_of

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError

TEXT = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1}  # fmt: skip
VISION = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
BERT = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {"vision_config": VISION, "text_config": TEXT},
    "T5ForConditionalGeneration": T5, "BertModel": BERT, "BertForMaskedLM": BERT,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two random models, a and b, of every class."""
    import transformers

    folder = tmp_path_factory.mktemp("saved")
    for name, config in CONFIGS.items():
        model_class = getattr(transformers, name)
        for seed, which in enumerate("ab"):
            torch.manual_seed(seed)
            model_class(model_class.config_class(**config)).save_pretrained(folder / name / which)
    return folder


def reloaded(result: Checkpoint, name: str, folder: Path) -> Any:
    """The result as transformers loads it, nothing missing and nothing left over."""
    import transformers

    save(result, folder)
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model


def mean(*models: str) -> dict[str, Any]:
    return {"models": [{"model": model} for model in models]}


def is_mean(result: Checkpoint, name: str) -> bool:
    a, b = (Checkpoint.open(which).read(name) for which in "ab")
    return bool(torch.allclose(result.read(name), (a + b) / 2, atol=1e-6))


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_merge_and_load_again(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit cannot merge the two BERTs."""
    monkeypatch.chdir(saved / name)
    result = result_of({"merge_method": "linear", **mean("a", "b")})
    assert result.specs == Checkpoint.open("a").specs
    assert all(is_mean(result, tensor) for tensor in result.specs)
    reloaded(result, name, tmp_path / "out")


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_an_encoder_s_layers_are_stacked(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved / name)
    slices = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in "ab"]
    result = result_of({"merge_method": "passthrough", "slices": slices})
    model = reloaded(result, name, tmp_path / "out")
    prefix = "" if name == "BertModel" else "bert."
    for layer, source, old in ((1, "a", 1), (3, "b", 1)):
        original = Checkpoint.open(source).read(f"{prefix}encoder.layer.{old}.output.dense.weight")
        assert torch.equal(model.base_model.encoder.layer[layer].output.dense.weight, original)
    assert torch.equal(model.base_model.embeddings.LayerNorm.bias, Checkpoint.open("a").read(f"{prefix}embeddings.LayerNorm.bias"))


def test_the_modules_of_a_vision_language_model_are_made_each_in_its_way(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "LlavaForConditionalGeneration"
    monkeypatch.chdir(saved / name)
    longer = [{"sources": [{"model": "b", "layer_range": part}, {"model": "a", "layer_range": part, "parameters": {"weight": 0}}]} for part in ([0, 2], [1, 2])]
    modules = {
        "text_decoder": {"slices": longer, "parameters": {"weight": 1}},
        "vision_tower": {"models": [{"model": "a", "parameters": {"weight": [1, 0]}}, {"model": "b", "parameters": {"weight": [0, 1]}}]},
        "multi_modal_projector": mean("a", "b"),
    }
    result = result_of({"merge_method": "linear", "modules": modules})
    a, b = Checkpoint.open("a"), Checkpoint.open("b")
    assert is_mean(result, "multi_modal_projector.linear_1.weight")
    assert is_mean(result, "vision_tower.encoder.layers.1.mlp.fc1.weight")
    assert torch.equal(result.read("vision_tower.encoder.layers.2.mlp.fc1.weight"), b.read("vision_tower.encoder.layers.2.mlp.fc1.weight"))
    assert torch.equal(result.read("vision_tower.embeddings.class_embedding"), a.read("vision_tower.embeddings.class_embedding"))
    assert torch.equal(result.read("language_model.lm_head.weight"), b.read("language_model.lm_head.weight"))
    assert (result.config["text_config"]["num_hidden_layers"], result.config["vision_config"]["num_hidden_layers"]) == (3, 3)
    model = reloaded(result, name, tmp_path / "out")
    assert torch.equal(model.model.language_model.layers[2].mlp.up_proj.weight, b.read("language_model.model.layers.1.mlp.up_proj.weight"))


def test_an_encoder_and_a_decoder_each_keep_their_own_count_of_layers(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "T5ForConditionalGeneration"
    monkeypatch.chdir(saved / name)
    encoder = {"slices": [{"sources": [{"model": "a", "layer_range": part}]} for part in ([0, 2], [1, 2])]}
    decoder = {"slices": [{"sources": [{"model": "b", "layer_range": [0, 2]}]}]}
    result = result_of({"merge_method": "passthrough", "modules": {"encoder": encoder, "decoder": decoder, "shared": {"models": [{"model": "b"}]}}})
    assert (result.config["num_layers"], result.config["num_decoder_layers"]) == (3, 2)
    model = reloaded(result, name, tmp_path / "out")
    assert torch.equal(model.encoder.block[2].layer[1].DenseReluDense.wi.weight, Checkpoint.open("a").read("encoder.block.1.layer.1.DenseReluDense.wi.weight"))
    assert torch.equal(model.shared.weight, Checkpoint.open("b").read("shared.weight"))


@pytest.mark.parametrize(
    ("name", "document", "problem"),
    [
        ("LlavaForConditionalGeneration", {"modules": {"text_decoder": mean("a"), "vision_towre": mean("a")}}, "a has no module 'vision_towre'. Did you mean"),
        ("LlavaForConditionalGeneration", {"modules": {"text_decoder": mean("a")}}, "modules: vision_tower, multi_modal_projector of a would be lost"),
        ("T5ForConditionalGeneration", {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "a has several modules .shared, encoder, decoder.;"),
        ("T5ForConditionalGeneration", {"modules": {
            "decoder": {"slices": [{"sources": [{"model": "a", "layer_range": [1, 3]}]}]}, "encoder": mean("a"), "shared": mean("a")}},
         "do not make a model: decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight is missing"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_are_refused(name: str, document: dict[str, Any], problem: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved / name)
    with pytest.raises(CheckpointError, match=problem):
        result_of({"merge_method": "passthrough", **document})
