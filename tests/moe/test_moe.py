"""A mixture of dense models: transformers loads it, equal experts are the dense model, routers are what transformers' own states say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint import plan as plans
from mergekit_plus.errors import CheckpointError, OptionError, RecipeError
from mergekit_plus.evaluate import load_model
from mergekit_plus.moe import MoeConfig, moe
from mergekit_plus.recipe import check, load, run

MODELS = Path(__file__).parents[1] / "models"
PROMPTS = {"code": ["def f(x):\n", "import os"], "docs": ["Return the value of the option.", "Changed in version"]}


@pytest.fixture(scope="module")
def real() -> dict[str, Checkpoint]:
    """The small real models of this repository: six-layer Llamas of one base."""
    return {name: Checkpoint.open(MODELS / name) for name in ("base", "code", "docs")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    folder = tmp_path_factory.getbasetemp()
    return {name: tiny_model(f"{name}ForCausalLM", folder) for name in ("Llama", "Mistral", "Qwen2", "Gemma")}


def experts(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"source_model": name, "positive_prompts": PROMPTS.get(name, [f"{name} {number}"]), **options} for number, name in enumerate(names)]


def mixture(inputs: Mapping[str, Checkpoint], base: str, *names: str, **config: Any) -> Checkpoint:
    return moe(inputs, MoeConfig.model_validate({"base_model": base, "experts": experts(*names), **config}))


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = load_model(checkpoint)(ids).logits
    return result


IDS = torch.arange(3, 35).reshape(2, 16)


# ---- layouts ----


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_equal_experts_are_the_dense_model(tiny: Mapping[str, Checkpoint], family: str) -> None:
    """Mixtral's weights of the chosen experts sum to one."""
    mixed = mixture(tiny, family, family, family, family, gate_mode="random")
    torch.testing.assert_close(logits(mixed, IDS), logits(tiny[family], IDS), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_equal_experts_beside_a_silent_shared_one_are_the_dense_model(tiny: Mapping[str, Checkpoint], family: str) -> None:
    silent = experts(family, residual_scale=0.0)
    mixed = mixture(tiny, family, family, family, shared_experts=silent, gate_mode="uniform_random")
    assert mixed.config["model_type"] == "qwen2_moe"
    torch.testing.assert_close(logits(mixed, IDS), logits(tiny[family], IDS), atol=1e-6, rtol=1e-5)


def test_a_mixture_of_real_models_keeps_their_numbers(real: Mapping[str, Checkpoint]) -> None:
    mixed = mixture(real, "base", "code", "docs", "base", gate_mode="random")
    layer = "model.layers.3"
    for number, name in enumerate(("code", "docs", "base")):
        for old, new in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            ours = mixed.read(f"{layer}.block_sparse_moe.experts.{number}.{new}.weight")
            assert torch.equal(ours, real[name].read(f"{layer}.mlp.{old}_proj.weight"))
    for name in ("lm_head.weight", f"{layer}.self_attn.q_proj.weight", f"{layer}.post_attention_layernorm.weight"):
        assert torch.equal(mixed.read(name), real["base"].read(name))
    assert len(mixed.specs) == 3 + 6 * (6 + 9 + 1)
    computed = [step.writes[0].name for step in plans.steps_of(mixed) if not plans.is_copy(step)]
    assert computed == [f"model.layers.{number}.block_sparse_moe.gate.weight" for number in range(6)]
    assert set(mixed.files) == set(real["base"].files)


def test_transformers_loads_the_folder(tiny: Mapping[str, Checkpoint], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(mixture(tiny, "Llama", "Llama", "Llama", gate_mode="random", dtype="bfloat16"), tmp_path / "mixtral")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (2, 2)
    save(mixture(tiny, "Qwen2", "Qwen2", "Qwen2", "Qwen2", shared_experts=experts("Qwen2"), gate_mode="random", experts_per_token=1), tmp_path / "qwen")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", output_loading_info=True)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_experts_per_tok == 1


def test_what_the_bases_family_takes_for_granted_is_written_down(tiny: Mapping[str, Checkpoint]) -> None:
    """A Llama that does not speak of its epsilon means 1e-6, a Mixtral 1e-5."""
    terse = tiny["Llama"].with_config(rms_norm_eps=None, rope_parameters=None, max_position_embeddings=None)
    config = mixture({"a": terse}, "a", "a", "a", gate_mode="random").config
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["max_position_embeddings"] == 2048
    assert "attention_bias" not in config


def test_scales_and_noise(tiny: Mapping[str, Checkpoint]) -> None:
    loud = experts("Llama", residual_scale=0.5) + experts("Llama", noise_scale=0.01) + experts("Llama", noise_scale=0.01)
    mixed, again, other = (moe(tiny, MoeConfig(base_model="Llama", experts=loud, gate_mode="random", seed=seed)) for seed in (1, 1, 2))
    weight = {part: tiny["Llama"].read(f"model.layers.0.mlp.{part}_proj.weight") for part in ("up", "down")}
    name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight".format
    assert torch.equal(mixed.read(name(0, "w2")), weight["down"] * 0.5)
    assert torch.equal(mixed.read(name(0, "w3")), weight["up"])
    noise = mixed.read(name(1, "w3")) - weight["up"]
    assert 0.008 < noise.std() < 0.012
    assert torch.equal(mixed.read(name(1, "w3")), again.read(name(1, "w3")))
    for same in (mixed.read(name(2, "w3")), other.read(name(1, "w3"))):
        assert not torch.equal(mixed.read(name(1, "w3")), same)


# ---- routers ----


def reference(model: Checkpoint, prompts: list[str]) -> Tensor:
    """The mean over the prompts of the last token's state before each layer, with transformers alone; [layers, hidden]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = MODELS / Path(model.label).name
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = []
    for prompt in prompts:
        ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(torch.stack([state[0, -1] for state in network(ids, output_hidden_states=True).hidden_states[:-1]]))
    return torch.stack(states).mean(0)


def test_hidden_routers_are_the_states_of_the_prompts(real: Mapping[str, Checkpoint]) -> None:
    negative = ["class A:", "for i in range(3):"]
    docs = {"source_model": "docs", "positive_prompts": PROMPTS["docs"], "negative_prompts": negative}
    mixed = moe(real, MoeConfig.model_validate({"base_model": "base", "experts": [*experts("code"), docs], "dtype": "float32"}))
    code = reference(real["base"], PROMPTS["code"])
    difference = reference(real["base"], PROMPTS["docs"]) - reference(real["base"], negative)
    for layer in range(6):
        rows = mixed.read(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        expected = torch.stack([code[layer] / code[layer].norm(), difference[layer] / difference[layer].norm()])
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


def test_the_router_sends_prompts_to_their_expert(real: Mapping[str, Checkpoint]) -> None:
    """Before the last layer a new prompt of either kind is nearer to its own."""
    mixed = mixture(real, "base", "code", "docs", dtype="float32", experts_per_token=1)
    gate = mixed.read("model.layers.5.block_sparse_moe.gate.weight")
    assert (gate @ reference(real["base"], ["def g(a, b):\n"])[5]).argmax() == 0
    assert (gate @ reference(real["base"], ["Changed in version 3.2: the function"])[5]).argmax() == 1


def test_cheap_routers_are_the_sum_of_the_embeddings_in_every_layer(real: Mapping[str, Checkpoint]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    ids = [token for prompt in PROMPTS["code"] for token in tokenizer("<s>" + prompt, add_special_tokens=False).input_ids]
    total = real["base"].read("model.embed_tokens.weight").float()[ids].sum(0)
    mixed = mixture(real, "base", "code", "docs", gate_mode="cheap_embed", dtype="float32")
    rows = [mixed.read(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in range(6)]
    torch.testing.assert_close(rows[0][0], total / total.norm())
    assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize(("mode", "spread", "most"), [("random", 1.0, 6.0), ("uniform_random", 1 / 48**0.5, 0.25)])
def test_random_routers_come_from_the_seed(tiny: Mapping[str, Checkpoint], mode: str, spread: float, most: float) -> None:
    def gate(seed: int) -> Tensor:
        mixed = mixture(tiny, "Llama", *["Llama"] * 8, gate_mode=mode, seed=seed)
        return torch.cat([mixed.read(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in (0, 1)])

    assert gate(0).shape == (16, 16)
    assert torch.equal(gate(0), gate(0))
    assert not torch.equal(gate(0), gate(1))
    assert gate(0).std() == pytest.approx(spread, rel=0.15)
    assert gate(0).abs().max() <= most


def test_a_shared_expert_gets_a_gate_of_its_prompts(real: Mapping[str, Checkpoint]) -> None:
    mixed = mixture(real, "base", "code", "docs", shared_experts=experts("base"), dtype="float32")
    expected = reference(real["base"], PROMPTS.get("base", ["base 0"]))[2]
    row = mixed.read("model.layers.2.mlp.shared_expert_gate.weight")
    torch.testing.assert_close(row, (expected / expected.norm())[None], atol=1e-5, rtol=1e-4)
    assert not mixed.read("model.layers.2.self_attn.v_proj.bias").any()


# ---- as a stream, and the doors ----


def test_the_same_bytes_for_any_number_of_workers(real: Mapping[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> Checkpoint:
        return moe(real, MoeConfig.model_validate({"base_model": "base", "experts": experts("code", "docs", residual_scale=0.9), "gate_mode": "cheap_embed"}))

    save(mixed(), tmp_path / "one.safetensors", SaveOptions(workers=1))
    monkeypatch.setattr(plans, "PIECE", 1 << 10)
    monkeypatch.setattr(plans, "SLAB", 1 << 12)
    save(mixed(), tmp_path / "two.safetensors", SaveOptions(workers=2))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_file_of_mergekit_moe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from cli import app

    monkeypatch.chdir(MODELS)
    (tmp_path / "moe.yaml").write_text(
        "base_model: base\ngate_mode: cheap_embed\ndtype: float32\nexperts:\n"
        "  - {source_model: code, positive_prompts: ['def f(x):']}\n  - {source_model: docs, positive_prompts: ['Changed in version']}\n"
    )
    result = CliRunner().invoke(app, ["moe", str(tmp_path / "moe.yaml"), "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    first = load_file(tmp_path / "out" / "model.safetensors")
    run(load(tmp_path / "out" / "recipe.yaml").model_copy(update={"out": str(tmp_path / "again")}))
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items())


def test_a_step_of_a_recipe(tmp_path: Path) -> None:
    step = {"base_model": "base", "experts": [{"source_model": "code"}, {"source_model": "docs"}], "gate_mode": "random"}
    inputs = {name: str(MODELS / name) for name in ("base", "code", "docs")}
    recipe = check({"inputs": inputs, "steps": [{"moe": step}, {"quantize": {"bits": 8}}], "out": str(tmp_path / "out")}, Path(), "recipe")
    run(recipe)
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts_per_token": 3}, "experts_per_token is 3, but there are 2 experts"),
        ({"dtype": "float17"}, "unknown dtype 'float17'"),
        ({"gate_mode": "hiden"}, "gate_mode: Input should be 'hidden', 'cheap_embed', 'random' or 'uniform_random'"),
        ({"gate": "hidden"}, "unknown key 'gate'. Did you mean 'gate_mode'?"),
        ({"experts": [{"source_model": "a", "positive_prompt": ["x"]}]}, "experts.0: unknown key 'positive_prompt'. Did you mean 'positive_prompts'?"),
        ({"gate_mode": "hidden"}, "no positive_prompts for a, b, and gate_mode hidden makes routers of prompts"),
        ({"gate_mode": "hidden", "experts": experts("a", "b", positive_prompts=["x"])}, "all experts have the same prompts"),
        ({"architecture": "qwen"}, "Qwen2-MoE has exactly one shared expert, not 0"),
        ({"architecture": "mixtral", "shared_experts": experts("a")}, "Mixtral has no shared experts"),
        ({"architecture": "deepseek"}, "architecture: Input should be 'mixtral' or 'qwen'"),
        ({"experts": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    import yaml

    config = {"base_model": "a", "experts": [{"source_model": "a"}, {"source_model": "b"}], "gate_mode": "random", **changes}
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RecipeError, match=reason.replace("?", r"\?")):
        load(tmp_path / "moe.yaml")


def changed(model: Checkpoint, folder: Path, tensors: Mapping[str, Tensor | None], **config: Any) -> Checkpoint:
    """A model with some tensors exchanged, or taken away, and another config."""
    folder.mkdir()
    table = {**{name: model.read(name) for name in model.specs}, **tensors}
    save_file({name: tensor for name, tensor in table.items() if tensor is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config, **config}))
    return Checkpoint.open(folder)


def test_models_that_cannot_be_experts_are_named(tiny: Mapping[str, Checkpoint], tmp_path: Path) -> None:
    llama, up = tiny["Llama"], "model.layers.0.mlp.up_proj"
    others = {
        "wide": (changed(llama, tmp_path / "wide", {f"{up}.weight": torch.zeros(40, 16)}), r"up_proj.weight: .*Llama.* has \(32, 16\), .*wide \(40, 16\)"),
        "short": (changed(llama, tmp_path / "short", {f"{up}.weight": None}), "short none"),
        "biased": (changed(llama, tmp_path / "biased", {f"{up}.bias": torch.zeros(32)}), f"biased has '{up}.bias', which the mixture has no place for"),
        "gelu": (changed(llama, tmp_path / "gelu", {}, hidden_act="gelu"), "gelu has the activation 'gelu'"),
        "Gemma": (tiny["Gemma"], "Gemma.* is of type 'gemma', which is none of llama, mistral"),
        "Mistral": (tiny["Mistral"], "Mistral.* is of type 'mistral', .*Llama.* of type 'llama'"),
        "Qwen2": (tiny["Qwen2"], "is of type 'qwen2', which is none of llama, mistral"),
    }
    for name, (model, reason) in others.items():
        with pytest.raises(CheckpointError, match=f"cannot be experts of one Mixtral mixture: .*{reason}"):
            mixture({"Llama": llama, name: model}, "Llama", "Llama", name, gate_mode="random")


def test_a_sliding_window_is_carried_or_refused(tiny: Mapping[str, Checkpoint]) -> None:
    sliding = {"a": tiny["Mistral"].with_config(sliding_window=32)}
    assert mixture(sliding, "a", "a", "a", gate_mode="random").config["sliding_window"] == 32
    with pytest.raises(CheckpointError, match="has a sliding window of 32 tokens in all layers, which Qwen2-MoE cannot have"):
        mixture(sliding, "a", "a", "a", gate_mode="random", shared_experts=experts("a"))


def test_prompts_that_the_base_cannot_read_are_refused(tiny: Mapping[str, Checkpoint], real: Mapping[str, Checkpoint]) -> None:
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(CheckpointError, match="Llama.* has no tokenizer"):
        mixture(tiny, "Llama", "Llama", "Llama").read(gate)
    long = [{"source_model": "code", "positive_prompts": ["x = 1\n" * 400]}, *experts("docs")]
    with pytest.raises(OptionError, match="a prompt has [0-9]+ tokens, but .*base reads at most 512; shorten it"):
        moe(real, MoeConfig.model_validate({"base_model": "base", "experts": long})).read(gate)
