"""Rotation: the same function, with weights that have fewer outliers to quantise.

In a model whose blocks read the residual stream through RMSNorm alone, the stream may be written in any orthonormal basis: h R for h. A norm's gain goes into
the layers that read behind it, which leaves the norm without one, and rms(h R) = rms(h) R. With layers y = W x, g the gain before them,

    embeddings E -> E R     layers that read the stream W -> W diag(g) R     layers that write to it W -> R^T W, b -> R^T b

and the head reads as layers do (a head that is tied to the embeddings gets weights of its own). The result is an ordinary checkpoint, and what stands
inside of a block (heads, values, the middle of an MLP) is as it was. This is R1 of SpinQuant (Liu et al., 2024), and of QuaRot (Ashkboos et al., 2024).

R = diag(signs) (H / sqrt(2^k) x Q): random signs, a Hadamard matrix over the power of two in the width, and a random orthogonal matrix over the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, copy_step
from mergekit_plus.errors import CheckpointError
from mergekit_plus.model import adapter_reason, describe, quantized_reason

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# module of a block -> the norm through which it reads the stream
READERS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
INSIDE = ("self_attn.q_norm", "self_attn.k_norm")  # of a block, off the stream
BLOCK = 1 << 20  # elements of a weight turned at a time
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rotation:
    """R of a width, from a seed. The bits of a row of x R do not depend on the other rows."""

    signs: Tensor  # float32 [width]
    rest: Tensor  # float32 [m, m], orthogonal, m the odd part of the width

    @classmethod
    def of(cls, width: int, seed: int) -> Rotation:
        generator = torch.Generator().manual_seed(seed)
        odd = width // (width & -width)
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        q, r = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
        return cls(signs, (q * r.diagonal().sign()).float() if odd > 1 else torch.ones(1, 1))

    def apply(self, x: Tensor) -> Tensor:
        """x R, float32 [rows, width]."""
        odd = len(self.rest)
        x = x.float() * self.signs
        half = 1
        while half * odd < x.shape[1]:  # butterflies
            x = x.view(len(x), -1, 2, half * odd)
            x = torch.stack((x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]), 2).flatten(1)
            half *= 2
        if odd > 1:
            parts = x.view(len(x), -1, odd)
            x = torch.zeros_like(parts)
            for number, row in enumerate(self.rest):
                x += parts[:, :, number : number + 1] * row
            x = x.flatten(1)
        return x / sqrt(half)

    def apply_to_columns(self, x: Tensor) -> Tensor:
        """R^T x, for [width, columns] or [width], in its dtype; a block of columns at a time."""
        result = torch.empty_like(x)
        columns = max(1, BLOCK // len(x))
        for part, into in zip(*(torch.split(whole.view(len(x), -1), columns, 1) for whole in (x, result)), strict=True):
            into.copy_(self.apply(part.T).T)
        return result


def rotate(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The checkpoint of the same function with its residual stream in another basis; every tensor in its dtype, rounded once.

    Errors: CheckpointError for an architecture in which it is not certain what reads and writes the stream, and as `quant.plan.quantize`.
    """
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    named = checkpoint.config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        what = ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture in config.json"
        raise CheckpointError(f"{checkpoint.label} ({what}) cannot be rotated: that is known to be exact for {', '.join(ARCHITECTURES)} only")
    roles, specs = describe(checkpoint), checkpoint.specs
    tied = any(HEAD in group for group in roles.tied)
    missing = [name for name in (EMBEDDING, NORM, *(() if tied else (HEAD,))) if name not in specs]
    if missing:
        raise CheckpointError(f"{checkpoint.label} cannot be rotated without {', '.join(missing)}")
    rotation = Rotation.of(specs[EMBEDDING].shape[1], seed)
    steps = [step for name in specs if (step := _step(checkpoint, roles.stack or "", name, rotation, tied)) is not None]
    if tied:
        steps.append(_reader(checkpoint, EMBEDDING, NORM, rotation, HEAD))
    result = Checkpoint(f"{checkpoint.label}, rotated", Plan(steps), checkpoint.files, checkpoint.notes)
    return result.with_config(tie_word_embeddings=False)


def _step(checkpoint: Checkpoint, stack: str, name: str, rotation: Rotation, tied: bool) -> Step | None:
    """What becomes of a tensor; None for a head that is only another name of the embeddings."""
    module, _, leaf = name.rpartition(".")
    if name == HEAD:
        return None if tied else _reader(checkpoint, HEAD, NORM, rotation)
    if name == NORM:
        return _made(checkpoint, name, torch.ones_like)
    if name == EMBEDDING:
        return _made(checkpoint, name, rotation.apply, 1)
    block, _, inner = module.removeprefix(f"{stack}.").partition(".")
    if module.startswith(f"{stack}.") and block.isdecimal() and leaf in ("weight", "bias"):
        if inner in INSIDE or (inner in READERS and leaf == "bias"):
            return copy_step(checkpoint, name)
        if inner in READERS:
            return _reader(checkpoint, name, f"{stack}.{block}.{READERS[inner]}.weight", rotation)
        if inner in WRITERS:
            return _made(checkpoint, name, rotation.apply_to_columns)
        if inner in READERS.values() and leaf == "weight":
            return _made(checkpoint, name, torch.ones_like)
    raise CheckpointError(f"{checkpoint.label} cannot be rotated: what {name} does to the residual stream is not known")


def _made(checkpoint: Checkpoint, name: str, function: Callable[[Tensor], Tensor], multiple: int = 0) -> Step:
    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return [function(tensors[0]).to(tensors[0].dtype)]

    return Step(((checkpoint, name),), (checkpoint.specs[name],), run, multiple)


def _reader(checkpoint: Checkpoint, name: str, norm: str, rotation: Rotation, to: str | None = None) -> Step:
    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        weight, gain = tensors
        return [rotation.apply(weight.float() * gain.float()).to(weight.dtype)]

    return Step(((checkpoint, name), (checkpoint, norm)), (replace(checkpoint.specs[name], name=to or name),), run, 1, takes=(None, "whole"))
