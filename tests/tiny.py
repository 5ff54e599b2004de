"""Tiny random models of real architectures, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_plus.checkpoint import Checkpoint

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
# class -> what its config says
ARCHITECTURES: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "GemmaForCausalLM": {**GROUPED, "head_dim": 8},
    "GPT2LMHeadModel": GPT2,
    "GPT2Model": GPT2,
    "GPTNeoXForCausalLM": SMALL,
    "OPTForCausalLM": {
        **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    },
    "BertForMaskedLM": SMALL,
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 2},
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "Qwen3MoeForCausalLM": {**EXPERTS, "head_dim": 8},
}


def tiny_model(name: str, under: Path, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of this class, saved in a folder of its own on the first call; `config` for one that is not in `ARCHITECTURES`."""
    folder = under / name
    if not folder.exists():
        import torch
        import transformers

        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        model_class(model_class.config_class(**(config or ARCHITECTURES[name]))).save_pretrained(folder)
    return Checkpoint.open(folder)
