"""The modules of an adapter as matrices that are coded: A by its rows, B by its columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_plus.adapters.peft import LowRank
from mergekit_plus.checkpoint import Checkpoint, TensorSpec
from mergekit_plus.checkpoint.finite import is_finite
from mergekit_plus.errors import CheckpointError

from .coding import Coding
from .container import Entry


def factor_entries(specs: Sequence[TensorSpec], codings: Sequence[Coding]) -> list[Entry]:
    """What is coded of A, B, A, B, ... of several modules, which have a coding each."""
    return [Entry(spec.name, spec.dtype, spec.shape, i % 2, codings[i // 2]) for i, spec in enumerate(specs)]


def factor_names(modules: Sequence[LowRank]) -> list[str]:
    """The tensors A, B, A, B, ... of modules."""
    return [name for module in modules for name in (module.a, module.b)]


def check_trained(part: Checkpoint, modules: Sequence[LowRank], factors: Sequence[Tensor]) -> None:
    """CheckpointError for an adapter with NaN in its factors A, B, A, B, ..., and for one whose every B is zero."""
    for name, tensor in zip(factor_names(modules), factors, strict=True):
        if not is_finite(tensor):
            raise CheckpointError(f"{part.label}: {name} holds values that are NaN or infinite; mend the adapter")
    if not any(bool(b.any()) for b in factors[1::2]):
        raise CheckpointError(f"{part.label} changes nothing: every B is zero, as before training; train it, or make one with `compress adapter train`")
