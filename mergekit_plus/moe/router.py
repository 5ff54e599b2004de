"""Router weights from prompts: an expert is chosen for what looks, to the base model, like the prompts that were written for it.

The rule is mergekit-moe's. `hidden`: the base model reads each prompt; before every layer the state of the last token is taken, and averaged over the
prompts. `cheap_embed`: the sum of the prompts' token embeddings, the same for all layers. The vector of the negative prompts is
subtracted, and the result scaled to length 1. `random` and `uniform_random` read no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoint import Checkpoint
from ..checkpoint.rows import pick_rows
from ..errors import CheckpointError, OptionError
from ..evaluate import load_model, load_tokenizer
from .config import Expert, GateMode

EMBEDDING = "model.embed_tokens.weight"


def gates(base: Checkpoint, experts: Sequence[Expert], mode: GateMode, layers: int, seed: int) -> Tensor:
    """The router rows of these experts, float32 [layers, experts, hidden].

    Errors: CheckpointError without a tokenizer that the prompts could be cut with; OptionError for a prompt longer than the model can read.
    """
    hidden = base.specs[EMBEDDING].shape[1]
    if mode in ("random", "uniform_random"):
        generator = torch.Generator().manual_seed(seed)
        shape = (layers, len(experts), hidden)
        return torch.randn(shape, generator=generator) if mode == "random" else (2 * torch.rand(shape, generator=generator) - 1) * hidden**-0.5
    tokenizer = load_tokenizer(base)
    look = _reader(base) if mode == "hidden" else _embedder(base, layers)

    def states(prompts: Sequence[str]) -> Tensor:
        return look([_ids(tokenizer, prompt, base) for prompt in prompts])  # [layers, hidden]

    rows = []
    for expert in experts:
        row = states(expert.positive_prompts or [])
        if expert.negative_prompts:
            row = row - states(expert.negative_prompts)
        rows.append(functional.normalize(row, dim=-1, eps=1e-8))
    return torch.stack(rows, dim=1)


def _ids(tokenizer: Any, prompt: str, base: Checkpoint) -> Tensor:
    """A prompt's tokens, int64 [tokens], after the token that begins a text."""
    ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or max(ids) >= base.specs[EMBEDDING].rows:
        raise CheckpointError(f"{base.label}: the prompt {prompt[:40]!r} has {'no token' if not ids else 'tokens that the model has no embeddings for'}")
    return torch.tensor(ids, dtype=torch.int64)


Look = Callable[[Sequence[Tensor]], Tensor]


def _reader(base: Checkpoint) -> Look:
    """Prompts -> the mean over them of the last token's state before each layer. Prompts go one by one, so that none is padded."""
    model = load_model(base)
    most = getattr(model.config, "max_position_embeddings", None)

    def look(prompts: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for ids in prompts:
            if most is not None and len(ids) > most:
                raise OptionError(f"a prompt has {len(ids)} tokens, but {base.label} reads at most {most}; shorten it")
            with torch.inference_mode():
                found = model.model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[:-1]
            last = torch.stack([state[0, -1].float() for state in found])
            total = last if total is None else total + last
        assert total is not None
        return total / len(prompts)

    return look


def _embedder(base: Checkpoint, layers: int) -> Look:
    """Prompts -> the sum of all their tokens' embeddings, scaled to length 1, for every layer."""

    def look(prompts: Sequence[Tensor]) -> Tensor:
        rows = pick_rows(lambda cut: base.read(EMBEDDING, cut), base.specs[EMBEDDING], torch.cat(list(prompts)))
        return functional.normalize(rows.float().sum(0), dim=-1, eps=1e-8).expand(layers, -1)

    return look
