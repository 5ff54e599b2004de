"""An adapter to be written as peft lays it out: names of tensors, and the adapter_config.json that makes peft and servers read them right.

Every scale is 1 (alpha = rank, for each module and for the adapter), because servers look at `lora_alpha / r` alone; r is the largest rank,
because they make room for so much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Plan, Step, TensorSpec
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.folder import ADAPTER_CONFIG
from ..checkpoint.plan import Read
from .peft import PREFIX

Factorise = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]  # what a step reads -> A [rank, in], B [out, rank]


@dataclass(frozen=True)
class Product:
    """A module of an adapter to be written: its rank, and the shape of `B A`: (out, in), (out, in, height, width) of a convolution."""

    module: str
    rank: int
    shape: tuple[int, ...]
    embedding: bool = False

    def specs(self, dtype: str) -> tuple[TensorSpec, TensorSpec]:
        """A and B."""
        names = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        shapes = (self.rank, *self.shape[1:]), (self.shape[0], self.rank, *(1 for _ in self.shape[2:]))
        a, b = (TensorSpec(f"{PREFIX}{self.module}.{name}", dtype, shape) for name, shape in zip(names, shapes, strict=True))
        return a, b

    def step(self, reads: Sequence[Read], factorise: Factorise, dtype: str) -> Step:
        """The step that writes A and B."""
        writes = self.specs(dtype)

        def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
            with torch.no_grad():
                parts = factorise(tensors)
            return [part.to(TORCH_DTYPES[dtype]).reshape(spec.shape) for part, spec in zip(parts, writes, strict=True)]

        return Step(tuple(reads), writes, run)


def adapter_of(
    label: str,
    products: Sequence[Product],
    steps: Sequence[Step],
    base: str | None,
    task: str | None,
    *,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Sequence[str] = (),
    biases: bool = False,
    tied: bool = False,
) -> Checkpoint:
    """The adapter of these products, as a checkpoint: its tensors come from the steps, its adapter_config.json from here.

    base: where users find the model that it belongs to, revision: its commit there. task: peft's task_type. biases: whether biases of the
    modules are among the tensors. tied: whether embeddings are, and the head that is tied to them.
    """
    rank = max((product.rank for product in products), default=1)
    ranks = {f"^{re.escape(product.module)}": product.rank for product in products if product.rank != rank}
    config: Mapping[str, Any] = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks, "use_rslora": False, "use_dora": False,
        "target_modules": [product.module for product in products], "modules_to_save": list(modules_to_save) or None,
        **({"ensure_weight_tying": True} if tied else {}),
        "bias": "lora_only" if biases else "none", "fan_in_fan_out": fan_in_fan_out, "lora_dropout": 0.0, "init_lora_weights": True,
    }  # fmt: skip
    return Checkpoint(label, Plan(steps), {ADAPTER_CONFIG: json.dumps(config, indent=2).encode() + b"\n"})
