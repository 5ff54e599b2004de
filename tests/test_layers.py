"""Where a model's layers are, for the architectures as transformers builds them and saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from mergekit_plus.checkpoint import Checkpoint, renamed
from mergekit_plus.errors import CheckpointError
from mergekit_plus.layers import Position, along, between, layer_misfits, layer_places, parts_of, positions
from mergekit_plus.model import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_one_stack_is_one_part_and_every_tensor_has_its_place(name: str, folder: Path) -> None:
    model = tiny_model(name, folder)
    (part,) = parts_of(model).values()
    assert part.name == ""
    assert len(part.layers) == 2
    assert len(part.layers[0]) == len(part.layers[1]) > 5
    placed = [*part.before, *part.after, *(tensor for layer in part.layers for tensor in layer)]
    assert sorted(placed) == sorted(model.specs)
    assert part.counts in (("num_hidden_layers",), ("n_layer",))
    assert layer_misfits(model) == {}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("LlamaForCausalLM", ["model.embed_tokens.weight"], ["lm_head.weight", "model.norm.weight"]),
        ("GPT2Model", ["wpe.weight", "wte.weight"], ["ln_f.bias", "ln_f.weight"]),
        ("OPTForCausalLM", ["model.decoder.embed_positions.weight", "model.decoder.embed_tokens.weight"],
         ["model.decoder.final_layer_norm.bias", "model.decoder.final_layer_norm.weight"]),
    ],
)  # fmt: skip
def test_embeddings_stand_before_the_layers_and_norm_and_head_after_them(name: str, before: list[str], after: list[str], folder: Path) -> None:
    """OPT builds its last norm before its layers."""
    (part,) = parts_of(tiny_model(name, folder)).values()
    assert [*part.before] == before
    assert [*part.after] == after


def test_without_a_config_json_names_tell(folder: Path) -> None:
    model = tiny_model("LlamaForCausalLM", folder)
    bare = Checkpoint("bare", model.source)
    (part,), (told,) = parts_of(model).values(), parts_of(bare).values()
    assert (told.layers, told.before, told.after) == (part.layers, part.before, part.after)
    assert told.counts == ()


def test_a_tensor_is_renamed_with_its_layer(folder: Path) -> None:
    (part,) = parts_of(tiny_model("Qwen3MoeForCausalLM", folder)).values()
    assert part.moved("model.layers.1.mlp.experts.1.up_proj.weight", 1, 12) == "model.layers.12.mlp.experts.1.up_proj.weight"
    (flat,) = parts_of(Checkpoint.from_tensors({"0.weight": torch.zeros(2), "1.weight": torch.zeros(2)})).values()
    assert flat.moved("1.weight", 1, 0) == "0.weight"


def test_places_go_from_0_to_1_in_every_stack_that_is_whole() -> None:
    names = ["embed", "a.0.w", "a.1.w", "a.2.w", "a.2.experts.5.w", "b.0.w", "mlp.0.w", "mlp.2.w"]
    assert layer_places(names) == {"a.0.w": 0, "a.1.w": 0.5, "a.2.w": 1, "a.2.experts.5.w": 1, "b.0.w": 1}


def test_a_line_through_points_is_exact_at_each_and_between_equal_ones() -> None:
    assert [between([0, 1, 3], t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 2, 3]
    assert {between([0.1] * 4, along(layer, 13)) for layer in range(13)} == {0.1}
    assert between([7], 0.3) == 7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_has_attention_and_mlp_and_only_norms_are_neither(name: str, folder: Path) -> None:
    model = tiny_model(name, folder)
    meanings = describe(model).tensors
    for tensor, position in positions(model).items():
        inside = meanings[tensor].block is not None and meanings[tensor].role != "norm"
        assert (position.kind == "rest") is not inside
        if inside:
            attends = any(word in tensor for word in ("q_proj", "k_proj", "v_proj", "o_proj", "self_attn.out_proj", "attn.c_", "attention."))
            assert (position.kind == "attention") is attends, tensor


def test_a_position_is_how_far_along_the_stack_and_in_what(folder: Path) -> None:
    found = positions(tiny_model("LlamaForCausalLM", folder))
    assert found["model.embed_tokens.weight"] == Position(0, "rest")
    assert found["model.layers.0.self_attn.q_proj.weight"] == Position(0, "attention")
    assert found["model.layers.1.mlp.up_proj.weight"] == Position(1, "mlp")
    assert found["model.layers.1.input_layernorm.weight"] == Position(1, "rest")
    assert found["model.norm.weight"] == found["lm_head.weight"] == Position(1, "rest")


def test_a_stack_with_a_hole_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"of the layers h.0 to h.2 some have no tensors"):
        parts_of(Checkpoint.from_tensors({"h.0.w": torch.zeros(2), "h.2.w": torch.zeros(2)}))


def test_a_layer_that_the_architecture_does_not_know_or_misses_is_a_misfit(folder: Path) -> None:
    model = tiny_model("LlamaForCausalLM", folder)
    names = {name: name for name in model.specs if ".0.mlp.up_proj" not in name} | {"model.layers.1.extra.weight": "model.norm.weight"}
    assert layer_misfits(renamed(model, names)) == {
        "model.layers.*.extra.weight": "model.layers.1.extra.weight has no place in LlamaForCausalLM as config.json describes it",
        "model.layers.*.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight is missing",
    }


def test_a_model_of_two_encoders_has_a_part_for_each_and_places_what_is_in_neither(tmp_path: Path) -> None:
    import transformers

    tower = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**tower, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}, {**tower, "vocab_size": 16, "max_position_embeddings": 8}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    model = Checkpoint.open(tmp_path / "clip")
    parts = {part.name: part for part in parts_of(model).values()}
    assert {name: len(part.layers) for name, part in parts.items() if part.layers} == {"text_model": 2, "vision_model": 3}
    assert (parts["text_model"].config, parts["vision_model"].config) == (("text_config",), ("vision_config",))
    placed = [name for part in parts.values() for name in (*part.before, *part.after, *(tensor for layer in part.layers for tensor in layer))]
    assert sorted(placed) == sorted(model.specs)
    assert "logit_scale" in placed
