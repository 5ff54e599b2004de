"""Random: what any criterion must beat."""

from __future__ import annotations

from torch import Tensor

from mergekit_plus.noise import Noise

from .pruner import pruner


@pruner("random", scopes=("tensor", "row", "block", "global"))
def random(weight: Tensor, *, noise: Noise) -> Tensor:
    """Weights go at random: what any criterion must beat.

    The draw belongs to the seed, the tensor's name and the weight's place, so that it is the same for any order, piece or worker.
    """
    return noise.uniform(0, weight).float()
