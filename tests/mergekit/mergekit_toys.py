"""Tiny Llamas whose tensors say where they come from, and documents built from them where one stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.recipe import build, load

SHAPES = {
    "self_attn.q_proj.weight": (4, 4), "self_attn.k_proj.weight": (2, 4), "self_attn.v_proj.weight": (2, 4), "self_attn.o_proj.weight": (4, 4),
    "mlp.gate_proj.weight": (6, 4), "mlp.up_proj.weight": (6, 4), "mlp.down_proj.weight": (4, 6),
    "input_layernorm.weight": (4,), "post_attention_layernorm.weight": (4,),
}  # fmt: skip
BIASES = {"self_attn.q_proj.bias": (4,), "self_attn.k_proj.bias": (2,), "self_attn.v_proj.bias": (2,), "self_attn.o_proj.bias": (4,)}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def llama(name: str, number: int, layers: int = 4, *, tied: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """Write the model `name`: every element of its layer i is 100 * number + i; 50 more in the embeddings, 60 in the last norm, 70 in the head."""
    shapes = {**SHAPES, **(BIASES if bias else {})}
    values = {f"model.layers.{layer}.{key}": (shape, layer) for layer in range(layers) for key, shape in shapes.items()}
    values |= {EMBEDDING: ((8, 4), 50), NORM: ((4,), 60), **({} if tied else {HEAD: ((8, 4), 70)})}
    Path(name).mkdir()
    tensors = {key: torch.full(shape, 100.0 * number + value, dtype=dtype) for key, (shape, value) in values.items()}
    save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
    said = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "max_position_embeddings": 32, "tie_word_embeddings": tied,
        "attention_bias": bias, "dtype": str(dtype).removeprefix("torch."), **config,
    }  # fmt: skip
    (Path(name) / "config.json").write_text(json.dumps(said))


def result_of(*documents: dict[str, Any] | str) -> Checkpoint:
    """What a file with these documents makes."""
    texts = [document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False) for document in documents]
    Path("document.yaml").write_text("\n---\n".join(texts))
    return build(load(Path("document.yaml"))).result


def value(result: Checkpoint, name: str) -> float:
    """The one value that all elements of a tensor have."""
    tensor = result.read(name).double()
    assert (tensor == tensor.flatten()[0]).all()
    return float(tensor.flatten()[0])


def layers(result: Checkpoint, key: str = "mlp.up_proj.weight") -> list[float]:
    """The value of this tensor in each layer."""
    count = sum(name.endswith(f".{key}") for name in result.specs)
    return [value(result, f"model.layers.{layer}.{key}") for layer in range(count)]


def ends(result: Checkpoint) -> dict[str, float]:
    """The values of what stands before and after the layers."""
    return {name: value(result, name) for name in (EMBEDDING, NORM, HEAD) if name in result.specs}
