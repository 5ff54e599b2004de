"""What the tensors of a checkpoint mean, for real architectures, by module and by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
from mergekit_plus.model import architecture, describe, fused_groups, meta_model, quantized_reason, tied_alias

Tiny = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Opens a tiny random model of an architecture."""
    return partial(tiny_model, under=tmp_path_factory.mktemp("tiny"))


LLAMA = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
ATTENTION = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
MLP_EXPERTS = [f"mlp.experts.{expert}.{name}" for expert in (0, 1) for name in ("down_proj", "gate_proj", "up_proj")]
MIXTRAL_EXPERTS = [f"block_sparse_moe.experts.{expert}.{name}" for expert in (0, 1) for name in ("w1", "w2", "w3")]
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
SHARED = "mlp.shared_expert."

# class, stack of blocks, linears of a block, linears outside of blocks, fused groups of a block
EXPECTED = [
    ("LlamaForCausalLM", "model.layers", LLAMA, [], [GATE_UP, QKV]),
    ("MistralForCausalLM", "model.layers", LLAMA, [], [GATE_UP, QKV]),
    ("Qwen2ForCausalLM", "model.layers", LLAMA, [], [GATE_UP, QKV]),
    ("GemmaForCausalLM", "model.layers", LLAMA, [], [GATE_UP, QKV]),
    ("GPT2LMHeadModel", "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], [], []),
    ("GPT2Model", "h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], [], []),
    (
        "GPTNeoXForCausalLM",
        "gpt_neox.layers",
        ["attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
        [],
        [],
    ),
    (
        "OPTForCausalLM",
        "model.decoder.layers",
        ["fc1", "fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"],
        [],
        [QKV],
    ),
    (
        "BertForMaskedLM",
        "bert.encoder.layer",
        [
            "attention.output.dense",
            "attention.self.key",
            "attention.self.query",
            "attention.self.value",
            "intermediate.dense",
            "output.dense",
        ],
        ["cls.predictions.transform.dense"],
        [["attention.self.query", "attention.self.key", "attention.self.value"]],
    ),
    ("MixtralForCausalLM", "model.layers", MIXTRAL_EXPERTS + ATTENTION, [], [MIXTRAL_EXPERTS, QKV]),
    (
        "Qwen2MoeForCausalLM",
        "model.layers",
        [*MLP_EXPERTS, f"{SHARED}down_proj", f"{SHARED}gate_proj", f"{SHARED}up_proj", *ATTENTION],
        [],
        [MLP_EXPERTS, [f"{SHARED}gate_proj", f"{SHARED}up_proj"], QKV],
    ),
    ("Qwen3MoeForCausalLM", "model.layers", MLP_EXPERTS + ATTENTION, [], [MLP_EXPERTS, QKV]),
]


def weights(stack: str, block: int, modules: list[str]) -> list[str]:
    return [f"{stack}.{block}.{module}.weight" for module in modules]


def bare(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors without config.json."""
    return replace(checkpoint, files={})


@pytest.mark.parametrize(("name", "stack", "inside", "outside", "fused"), EXPECTED, ids=[row[0] for row in EXPECTED])
def test_each_architecture_gives_its_linears_blocks_and_fused_groups(
    tiny: Tiny, name: str, stack: str, inside: list[str], outside: list[str], fused: list[list[str]]
) -> None:
    found = describe(tiny(name))
    in_blocks = [weight for block in (0, 1) for weight in weights(stack, block, inside)]
    assert sorted(found.linears) == sorted([*in_blocks, *(f"{module}.weight" for module in outside)])
    assert found.fused == tuple(tuple(weights(stack, block, group)) for block in (0, 1) for group in fused)
    assert found.stack == stack
    assert list(found.blocks) == [0, 1]
    assert set(weights(stack, 1, inside)) <= set(found.blocks[1])
    assert found.notes == ()
    assert all(meaning.parameter for meaning in found.tensors.values())


@pytest.mark.parametrize("name", [row[0] for row in EXPECTED])
def test_a_bare_file_without_config_is_described_as_the_model_is(tiny: Tiny, name: str) -> None:
    model, file = describe(tiny(name)), describe(bare(tiny(name)))
    assert file.linears == model.linears
    assert file.fused == model.fused
    for tensor, meaning in model.tensors.items():
        assert file.tensors[tensor] == replace(meaning, parameter=None, converted=False)  # which transformers alone knows


def test_the_roles_of_a_llama_are_those_of_its_modules(tiny: Tiny) -> None:
    found = describe(tiny("LlamaForCausalLM"))
    assert found.names("embedding") == ("model.embed_tokens.weight",)
    assert found.names("head") == ("lm_head.weight",)
    assert found.tensors["model.layers.1.input_layernorm.weight"].role == "norm"
    assert found.tensors["model.norm.weight"].block is None
    assert found.names("other") == ()


def test_a_bias_is_a_bias_but_that_of_a_norm_is_a_norm(tiny: Tiny) -> None:
    found = describe(tiny("BertForMaskedLM"))
    assert found.tensors["bert.encoder.layer.0.output.dense.bias"].role == "bias"
    assert found.tensors["bert.encoder.layer.0.output.LayerNorm.bias"].role == "norm"
    assert describe(tiny("Qwen2ForCausalLM")).tensors["model.layers.0.self_attn.q_proj.bias"].role == "bias"


def test_only_conv1d_of_gpt2_is_stored_in_by_out(tiny: Tiny) -> None:
    for checkpoint in (tiny("GPT2LMHeadModel"), tiny("GPT2Model"), bare(tiny("GPT2Model"))):
        found = describe(checkpoint)
        assert all(found.tensors[name].transposed for name in found.linears)
    assert not any(meaning.transposed for meaning in describe(tiny("OPTForCausalLM")).tensors.values())


def test_routers_of_experts_stay_dense(tiny: Tiny) -> None:
    assert describe(tiny("MixtralForCausalLM")).tensors["model.layers.0.block_sparse_moe.gate.weight"].role == "other"
    assert describe(tiny("Qwen2MoeForCausalLM")).tensors["model.layers.0.mlp.shared_expert_gate.weight"].role == "other"
    assert describe(bare(tiny("Qwen3MoeForCausalLM"))).tensors["model.layers.0.mlp.gate.weight"].role == "other"


def test_experts_name_the_packed_parameter_of_transformers(tiny: Tiny) -> None:
    found = describe(tiny("MixtralForCausalLM"))
    assert found.tensors["model.layers.1.block_sparse_moe.experts.0.w3.weight"].parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert found.tensors["model.layers.1.block_sparse_moe.experts.1.w2.weight"].parameter == "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("LlamaForCausalLM", ()),
        ("GemmaForCausalLM", (("model.embed_tokens.weight", "lm_head.weight"),)),
        ("GPT2LMHeadModel", (("transformer.wte.weight", "lm_head.weight"),)),
        ("OPTForCausalLM", (("model.decoder.embed_tokens.weight", "lm_head.weight"),)),
        (
            "BertForMaskedLM",
            (
                ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
                ("cls.predictions.bias", "cls.predictions.decoder.bias"),
            ),
        ),
    ],
)
def test_tied_names_are_those_of_transformers_and_the_cheap_alias_agrees(tiny: Tiny, name: str, tied: tuple[tuple[str, str], ...]) -> None:
    assert describe(tiny(name)).tied == tied
    for source, alias in tied:
        if alias.endswith("weight"):
            assert tied_alias(tiny(name), alias) == source


def test_an_alias_is_only_for_a_missing_head_of_a_model_that_may_be_tied(tiny: Tiny) -> None:
    gemma = tiny("GemmaForCausalLM")
    assert tied_alias(gemma, "model.embed_tokens.weight") is None  # it is there
    assert tied_alias(gemma, "model.layers.7.mlp.up_proj.weight") is None  # no head
    assert tied_alias(gemma.with_config(tie_word_embeddings=None), "lm_head.weight") == "model.embed_tokens.weight"
    assert tied_alias(gemma.with_config(tie_word_embeddings=False), "lm_head.weight") is None
    assert tied_alias(bare(gemma), "lm_head.weight") is None
    assert tied_alias(tiny("GPT2Model"), "lm_head.weight") is None  # a model without a head
    assert tied_alias(tiny("LlamaForCausalLM"), "lm_head.weight") is None


def test_a_vocabulary_that_was_resized_is_still_an_embedding(tiny: Tiny) -> None:
    found = describe(tiny("LlamaForCausalLM").with_config(vocab_size=128))
    assert found.tensors["model.embed_tokens.weight"].role == "embedding"
    assert found.tensors["lm_head.weight"].role == "head"


def test_an_architecture_that_transformers_does_not_know_is_described_by_names(tiny: Tiny) -> None:
    found = describe(tiny("LlamaForCausalLM").with_config(model_type="martian", auto_map={"AutoConfig": "evil.Config"}))
    assert found.linears == describe(tiny("LlamaForCausalLM")).linears
    assert "does not know model_type 'martian'" in found.notes[0]


def test_tensors_beside_the_architecture_are_told_by_name_and_noted(tiny: Tiny) -> None:
    llama = tiny("LlamaForCausalLM")
    extra = {name: llama.read(name) for name in llama.specs} | {"mtp.layers.0.mlp.up_proj.weight": torch.ones(8, 4)}
    found = describe(replace(Checkpoint.from_tensors(extra), files=llama.files))
    assert found.tensors["mtp.layers.0.mlp.up_proj.weight"].role == "linear"
    assert found.stack == "model.layers"
    assert "1 tensors are not in LlamaForCausalLM ('mtp.layers.0.mlp.up_proj.weight')" in found.notes[0]


def test_packed_experts_are_noted_and_are_not_linears() -> None:
    found = describe(Checkpoint.from_tensors({"layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 4)}))
    assert found.linears == ()
    assert "1 tensors pack the experts of a layer" in found.notes[0]


def test_roles_by_name_and_shape() -> None:
    tensors = {
        "visual.patch_embed.weight": torch.ones(4, 3, 2, 2),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),  # the causal mask of old GPT-2 files
        "h.0.ln_1.bias": torch.ones(4),
        "h.0.ln_1.weight": torch.ones(4),
        "position_ids": torch.arange(4),
        "shared.weight": torch.ones(6, 4),
        "score.weight": torch.ones(2, 4),
    }
    found = describe(Checkpoint.from_tensors(tensors))
    assert [found.tensors[name].role for name in tensors] == ["conv", "other", "norm", "norm", "other", "embedding", "head"]


def test_an_absurd_number_of_layers_is_not_built(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="asks for 1000000000 layers"):
        meta_model(tiny("LlamaForCausalLM").with_config(num_hidden_layers=10**9))


def test_a_malformed_config_is_an_error_of_the_checkpoint_and_a_note(tiny: Tiny) -> None:
    broken = tiny("LlamaForCausalLM").with_config(hidden_size="many")
    with pytest.raises(CheckpointError, match="transformers cannot"):
        meta_model(broken)
    assert describe(broken).linears == describe(tiny("LlamaForCausalLM")).linears
    odd = tiny("LlamaForCausalLM").with_config(architectures=7, quantization_config=["x"], text_config=3)
    assert describe(odd).linears
    assert quantized_reason(odd) is None


def test_without_architectures_the_class_follows_from_the_tensors(tiny: Tiny) -> None:
    assert architecture(tiny("LlamaForCausalLM").with_config(architectures=None))[0].__name__ == "LlamaForCausalLM"
    assert architecture(tiny("GPT2Model").with_config(architectures=["os"]))[0].__name__ == "GPT2Model"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        architecture(bare(tiny("LlamaForCausalLM")))


def test_a_group_of_one_is_no_group() -> None:
    assert fused_groups(["a.q_proj.weight", "a.o_proj.weight", "b.k_proj.weight", "b.q_proj.weight"]) == (
        ("b.q_proj.weight", "b.k_proj.weight"),
    )


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({"a.weight_packed": torch.ones(2, 2, dtype=torch.int32)}, {}, "quantized already (a.weight_packed)"),
        ({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, {"quant_method": "gptq"}, "(gptq, a.qweight)"),
        ({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}, "a.weight, F8_E4M3"),
        ({"a.weight": torch.ones(2, 2, dtype=torch.int8)}, {}, "a.weight, I8"),
        ({"a.weight": torch.ones(4, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)}, {}, "a.weight.absmax"),
        ({"a.weight": torch.ones(2, 2)}, {"quant_method": "fp8"}, "take the key 'quantization_config' out of config.json"),
        (
            {"a.weight_packed": torch.ones(2, 2, dtype=torch.int32)},
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "unpack it first with `compress dequantize memory`",
        ),
    ],
)
def test_a_quantised_checkpoint_says_why_and_what_to_do(tensors: dict[str, torch.Tensor], config: dict[str, str], reason: str) -> None:
    files = {"config.json": json.dumps({"quantization_config": config} if config else {"model_type": "llama"}).encode()}
    assert reason in (quantized_reason(replace(Checkpoint.from_tensors(tensors), files=files)) or "")


def test_a_dense_checkpoint_is_not_quantised(tiny: Tiny) -> None:
    assert quantized_reason(tiny("GPT2LMHeadModel")) is None
    assert quantized_reason(Checkpoint.from_tensors({"mask": torch.ones(2, 2, dtype=torch.uint8), "a.weight": torch.ones(2, 2)})) is None


def test_the_cheap_questions_do_not_import_transformers(tiny: Tiny) -> None:
    script = (
        "import sys; from mergekit_plus.checkpoint import Checkpoint; from mergekit_plus.model import *\n"
        f"c = Checkpoint.open({tiny('GemmaForCausalLM').label!r})\n"
        "assert tied_alias(c, 'lm_head.weight') and quantized_reason(c) is None\n"
        "import dataclasses; assert describe(dataclasses.replace(c, files={})).linears\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
