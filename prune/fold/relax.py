"""Relaxed sharing: beside the weights that it shares, every linear layer of a place has a low-rank voice of its own.

    voices(model, mapped(range(12), 2, "cycle", "average"), rank=8)      # {..layers.7.mlp.up_proj.lora_A.weight: A, ...lora_B.weight: B}

The place computes with W' + B A, where W' is shared and B A is the best of its rank for what the block that it was had beyond it: W - W' = U S V^T,
B = U S, A = V^T (Relaxed Recursive Transformers, arXiv 2410.20672; there is no factor alpha / rank). The target is always the block that stood at that
place. Where there is nothing beyond W', A is drawn, Gaussian, and B is zero, so that training can begin. Norms stay private here. In the paper they
are tied, so that a full rank, which gives back every linear weight, gives back the model only after the norms' gains were folded into the weights
that follow; here it gives back the model. Biases of linear layers are shared, and have no voice.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_plus.adapters.lowrank import leading
from mergekit_plus.adapters.product import working_dtype
from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.layers import Part
from mergekit_plus.model import Meaning, describe

from .compact import A, B, compacted, voice_of
from .surgery import Fold, mean_step, shareable, stack_of

Start = Literal["svd", "zero"]
_ASKED = re.compile(r"lora:([1-9]\d{0,8})(?::(svd|zero))?")


def rank_of(asked: str) -> tuple[int, Start]:
    """The rank in "lora:8", and how voices start: "svd", or "zero" in "lora:8:zero". Errors: OptionError for anything else."""
    found = _ASKED.fullmatch(asked)
    if found is None:
        raise OptionError(f"relax {asked}: write lora:RANK, as in lora:8, or lora:RANK:zero for voices that start at zero")
    return int(found[1]), "zero" if found[2] == "zero" else "svd"


def relaxed(checkpoint: Checkpoint, fold: Fold, rank: int, start: Start = "svd") -> Checkpoint:
    """The compact checkpoint of a fold whose places have voices. Errors: as `voices` and `compacted`."""
    factors = voices(checkpoint, fold, rank, start)
    assert isinstance(factors.source, Plan)
    modules = dict.fromkeys(module for name in factors.specs if (module := voice_of(name)) is not None)
    compact = compacted(checkpoint, fold, {module: (factors, f"{module}.{A}", f"{module}.{B}") for module in modules})
    assert isinstance(compact.source, Plan)
    others = [step for step in compact.source.steps if step.writes[0].name not in factors.specs]
    return replace(compact, source=Plan([*others, *factors.source.steps]))  # not copies of A and of B, each of which would compute both


def voices(checkpoint: Checkpoint, fold: Fold, rank: int, start: Start = "svd") -> Checkpoint:
    """The factors A [r, in] and B [out, r] of each place and linear layer, r = rank where the layer is so large; in the dtype of the weights.

    A block that shares with no other and has its own weights needs none. Each pair is one step: both are computed when one is read.
    Errors: as `stack_of`; OptionError for a rank below 1; CheckpointError where no layer can have one.
    """
    if rank < 1:
        raise OptionError(f"a voice has a rank of 1 or more, not {rank}")
    part = stack_of(checkpoint)
    able = relaxable(checkpoint, part)
    if not able:
        raise CheckpointError(f"{checkpoint.label}: no linear layer of its blocks can have a voice of its own; leave out --relax")
    steps = []
    for place, own in enumerate(fold.kept):
        if fold.sources(place) == (own,) and fold.groups.count(fold.groups[place]) == 1:
            continue
        for name in part.layers[own]:
            if name in able:
                sources = [part.moved(name, own, block) for block in fold.sources(place)]
                shared = Checkpoint("shared", Plan([mean_step(checkpoint, sources, name)]))
                steps.append(_voice_step(checkpoint, shared, name, part.moved(name, own, place), rank, start))
    return Checkpoint(f"voices of {checkpoint.label}", Plan(steps))


def relaxable(checkpoint: Checkpoint, part: Part) -> frozenset[str]:
    """The weights that may have a voice: those of linear layers; not experts, which transformers packs into one parameter, and not GPT-2's Conv1D."""
    tensors = describe(checkpoint).tensors
    of = Counter(meaning.parameter for meaning in tensors.values())

    def alone(meaning: Meaning) -> bool:
        return meaning.role == "linear" and not meaning.transposed and (meaning.parameter is None or of[meaning.parameter] == 1)

    return frozenset(name for name in shareable(checkpoint, part) if alone(tensors[name]))


def _voice_step(checkpoint: Checkpoint, shared: Checkpoint, name: str, at: str, rank: int, start: Start) -> Step:
    spec, module = checkpoint.specs[name], at.removesuffix(".weight")
    out, inputs = spec.shape
    rank = min(rank, out, inputs)
    writes = (replace(spec, name=f"{module}.{A}", shape=(rank, inputs)), TensorSpec(f"{module}.{B}", spec.dtype, (out, rank)))

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            wide = working_dtype(tensors[0].dtype)
            beyond = tensors[0].to(wide) - tensors[1].to(wide) if start == "svd" else torch.zeros((), dtype=wide).expand(out, inputs)
            return [factor.to(TORCH_DTYPES[spec.dtype]).contiguous() for factor in voice(beyond, rank, module)]

    return Step(((checkpoint, name), (shared, name)), writes, run)


def voice(beyond: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is the best of its rank for `beyond` [out, in]; the name seeds what is drawn."""
    if not beyond.any():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        drawn = torch.randn((rank, beyond.shape[1]), generator=torch.Generator().manual_seed(seed), dtype=beyond.dtype)
        return drawn / rank, beyond.new_zeros(beyond.shape[0], rank)
    u, s, v = leading(beyond, rank, name)
    return v.T, u * s
