"""HUT: a Hadamard product of the weight with a low-rank matrix."""

from __future__ import annotations

from torch import Tensor

from .lora import LowRank
from .variant import adapter


@adapter("hut")
class Hut(LowRank):
    """W o (1 + s BA): every weight is scaled, by a low-rank pattern.

    After the abstract of HUT (Hadamard updated transformation), whose exact form could not be read; this is the one that peft calls HiRA, with A
    and B started and scaled as LoRA's are. Zeros stay zeros by themselves, and a row of zeros cannot be repaired.
    """

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight * self.update()
