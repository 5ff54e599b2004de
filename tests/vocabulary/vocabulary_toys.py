"""Toy models with tokenizers made by hand: one-layer Llamas whose numbers say whose row they are."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = 8
LETTERS = [*string.ascii_lowercase[:20], "Ġ"]
Content = dict[str, Any]


def added(content: str, number: int, special: bool = True) -> Content:
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def bpe(merges: Sequence[str], special: Sequence[str], specials_first: bool = True, pieces: Sequence[str] = LETTERS, **model: Any) -> Content:
    """A byte-level BPE tokenizer: letters, one piece for each merge ("t h"), and special tokens at one end."""
    own = [*pieces, *(merge.replace(" ", "") for merge in merges)]
    tokens = [*special, *own] if specials_first else [*own, *special]
    ids = {token: number for number, token in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = ids if specials_first else {token: ids[token] for token in own}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(token, ids[token]) for token in special],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [merge.split(" ") for merge in merges], **model,
        },
    }  # fmt: skip


# Three tokenizers that share letters, two merges and their first special tokens, under other ids.
A = bpe(["t h", "th e", "i n"], ["<s>", "</s>"])
B = bpe(["i n", "in g", "t h", "th e", "Ġ the"], ["</s>", "<s>", "<|im_end|>"], specials_first=False)
C = bpe(["t h", "a n", "an d", "th a", "tha t"], ["<s>", "</s>", "<x>"])


def ids(content: Content) -> dict[str, int]:
    """Every token's id."""
    return content["model"]["vocab"] | {entry["content"]: entry["id"] for entry in content["added_tokens"]}


def toy(
    folder: Path, tokenizer: Content | None, seed: int, rows: int | None = None, tied: bool = False, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A model folder: row r of the embeddings begins with r, row r of the head with -r; the rest is told by `seed`."""
    folder.mkdir(parents=True)
    known = ids(tokenizer) if tokenizer else {}
    size = rows or max(known.values()) + 1
    shapes = {
        "model.embed_tokens.weight": (size, HIDDEN), "model.norm.weight": (HIDDEN,),
        **({} if tied else {"lm_head.weight": (size, HIDDEN)}),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (16, HIDDEN) for name in ("gate", "up")}, "model.layers.0.mlp.down_proj.weight": (HIDDEN, 16),
        "model.layers.0.input_layernorm.weight": (HIDDEN,), "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    tensors = {name: _numbers(shape, seed + 10 * place) for place, (name, shape) in enumerate(shapes.items())}
    tensors["model.embed_tokens.weight"][:, 0] = torch.arange(size)
    if not tied:
        tensors["lm_head.weight"][:, 0] = -torch.arange(size)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "bos_token_id": known.get("<s>"), "eos_token_id": known.get("</s>"), **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        names = {"bos_token": "<s>", "eos_token": "</s>"} if "<s>" in known else {}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def _numbers(shape: Sequence[int], seed: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.37 + seed).reshape(tuple(shape)).float()


WEIGHTS = {"a": 0.6, "b": 0.3, "c": 0.1}
# What mergekit is asked for: its tokenizer key, and whether `a` is the base.
GOLDEN_CASES: dict[str, tuple[Mapping[str, Any], bool]] = {
    "union": ({"source": "union"}, True),
    "union without a base": ({"source": "union"}, False),
    "base": ({"source": "base"}, True),
    "a model": ({"source": "b"}, True),
    "padded": ({"source": "union", "pad_to_multiple_of": 16}, True),
    "rules": (
        {
            "source": "union",
            "tokens": {
                "<new>": {"source": {"kind": "model_token", "model": "b", "token": "<|im_end|>"}},
                "<fifth>": {"source": {"kind": "model_token", "model": "c", "token_id": 5}, "force": True},
                "<none>": {"source": {"kind": "zero"}},
                "the": {"source": "b", "force": True},
                "and": {"source": {"kind": "zero"}},
                "in": {"source": "b"},
            },
        },
        True,
    ),
}  # fmt: skip
