"""Hidden states in a file: written once, batch after batch, and read batch by batch, so that their number costs no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ReadError

TOKENS = 2048  # in a batch, unless a window has more; a constant, as the batch decides in which order sums are rounded


def batch_size(window: int) -> int:
    """Windows in a batch."""
    return max(1, TOKENS // window)


@dataclass(frozen=True)
class HiddenStates:
    """float32 [windows, window, width] in a file, in batches of windows; iterating reads them in order."""

    path: Path
    windows: int
    window: int
    width: int

    @classmethod
    def write(cls, path: Path, batches: Iterable[Tensor]) -> HiddenStates:
        """A new file of these batches; it gets its name when it is complete. To outlive a kill it must be given to `Work.keep`, which syncs it, too."""
        partial = path.with_suffix(".partial")
        windows, shape = 0, (0, 0)
        with partial.open("wb", buffering=0) as file:
            for batch in batches:
                windows, shape = windows + len(batch), (batch.shape[1], batch.shape[2])
                left = batch.to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8).numpy().data
                while left:
                    left = left[file.write(left) :]
        partial.rename(path)
        return cls(path, windows, *shape)

    @property
    def batch(self) -> int:
        """Windows in a batch; the last may have fewer."""
        return batch_size(self.window)

    def __len__(self) -> int:
        return -(-self.windows // self.batch)

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.batch
        rows = min(self.batch, self.windows - first)
        found = torch.empty((rows, self.window, self.width), dtype=torch.float32)
        left = found.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * self.window * self.width * 4)
            while left:
                count = file.readinto(left)
                if not count:
                    raise ReadError(f"{self.path} ends in the middle of the hidden states; delete it and start again")
                left = left[count:]
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))
