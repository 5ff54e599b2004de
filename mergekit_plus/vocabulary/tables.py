"""The tensors whose rows are tokens."""

from __future__ import annotations

import re

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..model import describe, vocabulary_size

_NOT_TOKENS = re.compile(r"pos|type|wpe|relative", re.IGNORECASE)  # embeddings of positions and segments


def vocabulary_tables(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors with a row for each token: embeddings, heads, their biases; by their roles and config.json's vocab_size.

    Errors: CheckpointError where config.json says no size, or no tensor has so many rows.
    """
    size = vocabulary_size(checkpoint)
    if size is None:
        raise CheckpointError(f"{checkpoint.label}: no config.json says a vocab_size, so that nobody knows which rows are tokens; open the model's folder")
    found = []
    for name, meaning in describe(checkpoint).tensors.items():
        spec = checkpoint.specs[name]
        outside = meaning.block is None or not spec.shape[1:]
        is_table = meaning.role in ("embedding", "head") and not _NOT_TOKENS.search(meaning.module.rpartition(".")[2])
        is_bias = meaning.role in ("bias", "other") and len(spec.shape) == 1 and meaning.block is None
        if spec.rows == size and spec.is_float and outside and (is_table or is_bias):
            found.append(name)
    if not any(len(checkpoint.specs[name].shape) == 2 for name in found):
        raise CheckpointError(f"{checkpoint.label}: config.json says vocab_size {size}, but no embedding has {size} rows; mend config.json")
    return tuple(found)
