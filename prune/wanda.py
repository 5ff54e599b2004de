"""Wanda: a weight counts as much as its input is large."""

from __future__ import annotations

from torch import Tensor

from mergekit_plus.moments import Moments

from .pruner import pruner


@pruner("wanda", calibrated=True, scopes=("row", "tensor", "block"))
def wanda(weight: Tensor, *, moments: Moments) -> Tensor:
    """The weights go that matter least to their outputs on a text: |w| times the norm of its input.

    Scores are `|W_ij| sqrt(mean x_j^2)`, compared within each output row as in the released code (arXiv 2306.11695); "tensor" is PERP's variant of it. It
    differs only in counting: the sparsity is taken as it is written (0.29 of 100 inputs are 29, not 28), and weights that are zero already go first. A layer
    that no token reached (an expert that was never chosen) is pruned by magnitude.
    """
    scores = weight.float().abs()
    return scores if moments.tokens == 0 else scores * moments.norms.to(scores.device)
