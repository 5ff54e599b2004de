"""What the tests over the whole registry need to know of each method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from merge_toys import near, random
from torch import Tensor

from mergekit_plus.merge import METHODS

Options = Mapping[str, Any]

# options that make a method do all it can do
BUSY: dict[str, dict[str, Any]] = {
    "passthrough": {"scale": 0.5},
    "linear": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {"weight": 0.7, "normalize_weights": False},
    "karcher": {"max_iter": 3},
    "nearswap": {"t": 0.005},
    "arcee_fusion": {},
    "task_arithmetic": {"weight": 0.4, "lambda": 0.9},
    "ties": {"density": 0.3, "weight": 0.7, "rescale": True},
    "ties_global": {"density": 0.3, "lambda": 0.8},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "normalize": True},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1, "rescale": True},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.2, "normalize": True},
    "della": {"density": 0.5, "epsilon": 0.3},
    "della_linear": {"density": 0.5, "rescale": "l1"},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.005},
    "ramplus_tl": {"epsilon": 0.005, "r": 0.5, "alpha": 2.0},
    "model_stock": {"filter_wise": True},
    "pcb": {"ratio": 0.2, "exclude_frozen": True},
    "consensus": {"mask_lambda": 0.5, "lambda": 0.7},
    "emr": {"lambda": 0.7},
    "tsv": {"lambda": 0.7},
    "iso_c": {"lambda": 0.7},
    "iso_cts": {"common": 0.5, "lambda": 0.7},
    "knots": {"density": 0.4, "lambda": 0.7},
}
# those that give the model when all models are that model, with these options
AVERAGE: dict[str, Any] = {"normalize": True}
KEEPS_EQUAL: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("passthrough", "linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "ties", "sce", "model_stock", "emr")},
    **dict.fromkeys(("task_arithmetic", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"), AVERAGE),
    "ties_global": {"density": 1.0}, "knots": {"density": 1.0}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0},
}  # fmt: skip
# those in which the first model has a place of its own
ORDERED = {"passthrough", "slerp", "nearswap", "arcee_fusion"}


def count(name: str) -> int:
    """How many models the tests give a method."""
    return METHODS[name].models[1] or 3


def inputs(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, list[Tensor]]:
    """A base, for those that take one, and models near it."""
    base = random(*shape, dtype=dtype)
    return (base if METHODS[name].takes_base else None), near(base, count(name))
