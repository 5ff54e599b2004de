"""Tables of one size that do not mean the same: rows that would be averaged though they are different tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .tokenizer import JSON, read_tokenizer


def misalignment(models: Sequence[Checkpoint]) -> str | None:
    """Why the rows of these models do not go together: a token that two of them have, under two ids; None where there is none.

    Ids whose text differs are no reason, since fine-tunes give reserved tokens names of their own; nor is a tokenizer that cannot be read.
    """
    first, *others = [model for model in models if JSON in model.files] or models
    for other in others:
        if JSON not in other.files or other.file(JSON) == first.file(JSON):
            continue
        try:
            known, found = (tokenizer.tokens if (tokenizer := read_tokenizer(model)) else {} for model in (first, other))
        except CheckpointError:
            continue
        if moved := [token for token, number in found.items() if known.get(token, number) != number]:
            token, count = moved[0], len(moved)
            where = f"token '{token}' is row {known[token]} of {first.label} but row {found[token]} of {other.label}"
            return f"{where}{f', and {count - 1} more tokens moved too' if count > 1 else ''}"
    return None
