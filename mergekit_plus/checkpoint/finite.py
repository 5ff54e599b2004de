"""NaN and infinities: found cheaply, refused in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError

BLOCK = 1 << 22  # elements summed at once


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. A finite sum settles it; only a sum that is not is looked at closely."""
    dtype = torch.float32 if tensor.dtype == torch.float16 else None  # bfloat16 has float32's range and sums in float32 as it is
    flat = tensor.reshape(-1)
    parts = (flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK))  # what the sum converts stays small
    return all(bool(torch.isfinite(part.sum(dtype=dtype))) or bool(torch.isfinite(part).all()) for part in parts)


def nonfinite(label: str, name: str, tensor: Tensor) -> CheckpointError:
    """The error that names a tensor with NaN or infinite values."""
    count = int((~torch.isfinite(tensor)).sum())
    values = f"{count} values that are" if count > 1 else "a value that is"
    return CheckpointError(f"{label}: {name} holds {values} NaN or infinite; mend the model, or carry them with --allow-nonfinite")
