"""Random bits that belong to an element, not to a moment: the same for any order, piece, worker or device.

Philox (Salmon et al., SC 2011) turns a key and a counter into bits. The key is made of the seed, the tensor's name and the
model's place; the counter is the element's flat index. Eight elements share one step of the counter, 32 bits each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PER_STEP = 8  # a step of Philox4x64 gives 4 words of 64 bits


@dataclass(frozen=True, slots=True)
class Noise:
    """The random bits of one tensor's elements from flat index `first` on."""

    seed: int
    name: str
    first: int = 0

    def bits(self, model: int, count: int) -> NDArray[np.uint32]:
        """32 uniform bits for each of the next `count` elements, independent between models, names and seeds."""
        digest = hashlib.blake2b(repr((self.seed, self.name, model)).encode(), digest_size=16).digest()
        generator = np.random.Philox(key=np.frombuffer(digest, "<u8"))
        steps, skip = divmod(self.first, PER_STEP)
        generator.advance(steps)
        words = generator.random_raw((skip + count + 1) // 2)
        bits: NDArray[np.uint32] = words.astype("<u8", copy=False).view("<u4")[skip : skip + count]
        return bits

    def uniform(self, model: int, like: Tensor) -> Tensor:
        """A number of [0, 1) for each element in float64, independently, in the shape and on the device of `like`."""
        return torch.from_numpy(self.bits(model, like.numel()) / 2.0**32).reshape(like.shape).to(like.device)

    def keep(self, model: int, density: float, like: Tensor) -> Tensor:
        """True with probability `density` for each element, independently, in the shape and on the device of `like`."""
        if density >= 1:
            return torch.ones_like(like, dtype=torch.bool)
        kept = self.bits(model, like.numel()) < np.uint32(min(round(density * 2**32), 2**32 - 1))
        return torch.from_numpy(kept).reshape(like.shape).to(like.device)
