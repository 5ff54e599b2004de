"""Tiny models with adapters of every kind, made by peft itself with random values in every trainable tensor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
TOKENS = torch.arange(12).view(1, 12) * 5


def model_of(kind: str = "LlamaForCausalLM", **changes: Any) -> Any:
    """A random tiny model."""
    torch.manual_seed(0)
    known = {"GPT2LMHeadModel": GPT2}.get(kind, LLAMA)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**{**known, **changes})).eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder of a model."""
    model.save_pretrained(folder)
    return folder


def adapted(model: Any, folder: Path, seed: int = 1, **options: Any) -> Any:
    """The model with a random adapter, which is saved in a folder; what is trained differs from where it starts, biases and lengths too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on this and that
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def merged(wrapped: Any) -> dict[str, Tensor]:
    """What peft makes of base and adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(wrapped.merge_and_unload().state_dict())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
