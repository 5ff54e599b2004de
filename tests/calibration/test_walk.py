"""A text flows block by block through models of many architectures as it flows through the whole of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, GROUPED, SMALL, tiny_model
from torch import Tensor

from mergekit_plus.calibration import Block, walk
from mergekit_plus.checkpoint import Checkpoint, Work
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.moments import Moments

Tiny = Callable[..., Checkpoint]
IDS = (torch.arange(12 * 40) * 7 % 61 + 3).view(12, 40)  # [windows, window]; two batches would need 52 windows
MORE: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 8},  # layers with other masks than their neighbours
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "PhiForCausalLM": SMALL,
    "DeepseekV3ForCausalLM": {
        **SMALL, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2,
    },
    "ModernBertForMaskedLM": {**SMALL, "pad_token_id": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Opens a tiny random model of an architecture."""
    return partial(tiny_model, under=tmp_path_factory.mktemp("tiny"))


def hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(input_ids=ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_every_block_sees_and_makes_the_hidden_states_of_the_whole_model(tiny: Tiny, tmp_path: Path, name: str) -> None:
    checkpoint = tiny(name, config=MORE.get(name))
    expected = hidden_states(load_model(checkpoint), IDS)
    seen = []

    def process(block: Block) -> dict[str, Tensor]:
        seen.append(block.name)
        torch.testing.assert_close(torch.cat(list(block.inputs)), expected[block.index], rtol=0, atol=1e-5)
        assert set(block.weights) <= set(block.names)
        return {}

    walk(checkpoint, IDS, process, Work(tmp_path))
    assert len(seen) == len(expected) - 1
    assert all(any(tensor.startswith(f"{block}.") for tensor in checkpoint.specs) for block in seen)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]  # no hidden states are left


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BertForMaskedLM", "GPTNeoXForCausalLM"])
def test_moments_are_those_of_the_inputs_of_every_linear_layer_of_the_whole_model(tiny: Tiny, tmp_path: Path, name: str) -> None:
    checkpoint = tiny(name)
    model = load_model(checkpoint)
    inputs: dict[str, Tensor] = {}
    for module, layer in model.named_modules():
        layer.register_forward_pre_hook(lambda layer, args, module=module: inputs.update({module: args[0].double()}) if args else None)
    hidden_states(model, IDS)
    known = {f"{module}.weight".removeprefix("transformer.") if name.startswith("GPT2") else f"{module}.weight": x for module, x in inputs.items()}
    checked = []

    def process(block: Block) -> dict[str, Tensor]:
        for weight, moments in block.moments().items():
            x = known[weight.removeprefix("transformer.") if name.startswith("GPT2") else weight].flatten(0, -2)  # [tokens, in]
            assert moments.tokens == len(x) == IDS.numel()
            gram = x.T @ x / len(x)
            assert float((moments.gram - gram).norm() / gram.norm()) < 1e-6
            torch.testing.assert_close(moments.mean, x.mean(0).float(), rtol=1e-5, atol=1e-6)
            assert block.weights[weight].shape[1] == len(gram)
            checked.append(weight)
        return {}

    walk(checkpoint, IDS, process, Work(tmp_path))
    assert len(checked) == {"LlamaForCausalLM": 14, "GPT2LMHeadModel": 8, "GPTNeoXForCausalLM": 8}.get(name, 12)


def test_a_gram_matrix_summed_in_panels_is_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Moments]] = []
    for panel in (256, 5):
        monkeypatch.setattr("mergekit_plus.calibration.block.PANEL", panel)
        walk(tiny("LlamaForCausalLM"), IDS, lambda block: found.append(block.moments()) or {}, Work(tmp_path / str(panel)))  # type: ignore[func-returns-value]
    for whole, in_panels in zip(found[:2], found[2:], strict=True):
        for name, moments in whole.items():
            torch.testing.assert_close(in_panels[name].gram, moments.gram, rtol=1e-6, atol=1e-7)
            assert torch.equal(in_panels[name].gram, in_panels[name].gram.T)


def test_layers_with_the_same_input_share_their_moments(tiny: Tiny, tmp_path: Path) -> None:
    def process(block: Block) -> dict[str, Tensor]:
        moments = {name.removeprefix(f"{block.name}.").removesuffix(".weight"): own for name, own in block.moments().items()}
        assert list(moments) == [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        assert moments["self_attn.q_proj"] is moments["self_attn.k_proj"] is moments["self_attn.v_proj"]
        assert moments["mlp.gate_proj"] is moments["mlp.up_proj"] is not moments["self_attn.o_proj"]
        return {}

    walk(tiny("LlamaForCausalLM"), IDS, process, Work(tmp_path))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_have_the_moments_of_the_tokens_that_are_sent_to_them(tiny: Tiny, tmp_path: Path, name: str) -> None:
    checkpoint = tiny(name)

    def process(block: Block) -> dict[str, Tensor]:
        moments = block.moments()
        experts = [weight for weight in checkpoint.specs if weight.startswith(f"{block.name}.") and ".experts." in weight]
        assert set(experts) <= set(moments)
        for weight in experts:
            torch.testing.assert_close(block.weights[weight], checkpoint.read(weight).float())
        each = [moments[weight].tokens for weight in experts if weight.endswith(("w1.weight", "gate_proj.weight"))]
        assert sum(each) == IDS.numel() * int(checkpoint.config["num_experts_per_tok"])
        gate = next(weight for weight in experts if weight.endswith(("w1.weight", "gate_proj.weight")))
        assert moments[gate] is moments[gate.replace("w1", "w3").replace("gate_proj", "up_proj")]
        return {}

    walk(checkpoint, IDS, process, Work(tmp_path))


def test_an_expert_that_no_token_reaches_has_no_tokens(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    walk(tiny("Qwen3MoeForCausalLM"), IDS[:1, :2], lambda block: found.extend(block.moments().values()) or {}, Work(tmp_path))  # type: ignore[func-returns-value]
    unseen = [moments for moments in found if not moments.tokens]
    assert unseen
    assert all(not moments.gram.any() and not moments.mean.any() for moments in unseen)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_what_is_written_into_a_weight_is_what_later_blocks_see(tiny: Tiny, tmp_path: Path, name: str) -> None:
    checkpoint = tiny(name)
    halved = {weight: checkpoint.read(weight) for weight in checkpoint.specs}

    def process(block: Block) -> dict[str, Tensor]:
        if block.index == 1:
            states.extend(block.inputs)
        for weight, values in block.weights.items():
            values.mul_(0.5)
            assert torch.equal(values, checkpoint.read(weight).float().T / 2 if name == "GPT2LMHeadModel" else checkpoint.read(weight).float() / 2)
            halved[weight] = checkpoint.read(weight) / 2
        return {}

    states: list[Tensor] = []
    walk(checkpoint, IDS, process, Work(tmp_path))
    changed = Checkpoint("changed", Checkpoint.from_tensors(halved).source, checkpoint.files)
    torch.testing.assert_close(torch.cat(states), hidden_states(load_model(changed), IDS)[1], rtol=0, atol=1e-5)


def test_with_cross_the_unchanged_model_flows_along(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    model = load_model(checkpoint)
    inputs: dict[str, Tensor] = {}
    for module, layer in model.named_modules():
        layer.register_forward_pre_hook(lambda layer, args, module=module: inputs.update({module: args[0].double()}) if args else None)
    hidden_states(model, IDS)
    seen: dict[str, Tensor] = {}

    def process(block: Block) -> dict[str, Tensor]:
        for weight in block.weights.values():
            weight.mul_(0.5)
        layers = {name: block.module.get_submodule(name.removeprefix(f"{block.name}.").removesuffix(".weight")) for name in block.weights}
        hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()})) for name, layer in layers.items()]
        list(block.outputs())
        for hook in hooks:
            hook.remove()
        for name, moments in block.moments(cross=True).items():
            dense, now = inputs[name.removesuffix(".weight")].flatten(0, -2), seen[name].flatten(0, -2)
            torch.testing.assert_close(moments.cross, (dense.T @ now / len(now)).float(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(moments.gram, (now.T @ now / len(now)).float(), rtol=1e-4, atol=1e-6)
        return {}

    walk(checkpoint, IDS, process, Work(tmp_path), cross=True)


def test_a_walk_that_stopped_goes_on_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    """The second run finds the first block done, and the hidden states before the second."""
    checkpoint, known = tiny("LlamaForCausalLM"), {}

    def process(stop: int, calls: list[int], block: Block) -> dict[str, Tensor]:
        calls.append(block.index)
        if block.index == stop:
            raise KeyboardInterrupt
        for weight in block.weights.values():
            weight.mul_(0.5)
        return {f"{block.name}.inputs": torch.cat(list(block.inputs))}

    whole = walk(checkpoint, IDS, partial(process, -1, []), Work(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        walk(checkpoint, IDS, partial(process, 1, []), Work(tmp_path / "cut", note=lambda name, digest: known.update({name: digest})))
    calls: list[int] = []
    parts = walk(checkpoint, IDS, partial(process, -1, calls), Work(tmp_path / "cut", known=known))
    assert calls == [1]
    for ours, theirs in zip(parts, whole, strict=True):
        assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.specs)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}, "has an encoder and a decoder"),
        ("ViTModel", {**{key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}}, "reads pixel_values"),
        ("AlbertForMaskedLM", {**SMALL, "embedding_size": 8}, "runs 2 layers with 1 blocks"),
    ],
)
def test_a_model_that_is_no_stack_of_blocks_for_text_is_refused(tiny: Tiny, tmp_path: Path, name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        walk(tiny(name, config=config), IDS, lambda block: {}, Work(tmp_path))


def test_ids_that_the_model_cannot_take_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="token 64 is outside the model's vocabulary of 64"):
        walk(tiny("LlamaForCausalLM"), torch.full((1, 8), 64), lambda block: {}, Work(tmp_path))
    with pytest.raises(OptionError, match="a window of 65 tokens: the model takes 64 at most; give a smaller --window"):
        walk(tiny("LlamaForCausalLM"), torch.ones((1, 65), dtype=torch.int64), lambda block: {}, Work(tmp_path))


def test_whoever_takes_a_blocks_outputs_keeps_gradients_as_they_were(tiny: Tiny, tmp_path: Path) -> None:
    def process(block: Block) -> dict[str, Tensor]:
        first = next(outputs := block.outputs())
        assert torch.is_grad_enabled()
        assert not first.requires_grad
        del outputs
        return {}

    walk(tiny("LlamaForCausalLM"), IDS, process, Work(tmp_path))
    assert torch.is_grad_enabled()
