"""Which blocks of a checkpoint go, and whose weights groups have: the model is loaded, and a text tells."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import OptionError
from mergekit_plus.progress import Progress

from .blocks import load_blocks
from .importance import Importance, importance
from .maps import choose_parents
from .surgery import Fold, folded, stack_of


def count_of(remove: float, blocks: int) -> int:
    """How many blocks a number, or a share below 1, is. Errors: OptionError where none would be left."""
    count = round(remove * blocks) if remove < 1 else int(remove)
    if not 0 <= count < blocks or (remove >= 1 and count != remove):
        raise OptionError(f"remove {remove:g}: a share below 1, or a number of the {blocks} blocks that leaves one at least")
    return count


def find(
    checkpoint: Checkpoint, rows: Tensor, remove: float, by: str, *, pinned: Sequence[int] = (), seed: int = 0, device: str = "cpu", progress: Progress
) -> Importance:
    """The blocks that count least on a text, rows: int64 [windows, window]; the model is in memory in float32.

    Errors: as `importance` and `stack_of`; CheckpointError for a model that predicts no next token.
    """
    count = count_of(remove, len(stack_of(checkpoint).layers))
    return importance(load_blocks(checkpoint, rows, device, progress), rows.to(device), count, by, pinned=pinned, seed=seed, progress=progress)


def find_parents(checkpoint: Checkpoint, fold: Fold, rows: Tensor, *, device: str = "cpu", progress: Progress) -> tuple[int, ...]:
    """For each group of a fold the member whose weights lose least on a text, as `choose_parents` says; the model is in memory in float32.

    Errors: as `find`.
    """
    blocks = load_blocks(folded(checkpoint, Fold.of(fold.kept)), rows, device, progress)
    return choose_parents(blocks, fold, rows.to(device), progress)
