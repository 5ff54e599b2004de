"""What the Gram matrix of a layer's inputs says of its weight: its factor, and what to aim at behind layers that err already.

H is the mean of x x^T over the inputs x of a calibration text. The mean squared error of the outputs of Q for those of W is tr((W - Q) H (W - Q)^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_plus.errors import CheckpointError
from mergekit_plus.moments import Moments


def damped(gram: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I: as if every input had some power of its own."""
    mean = gram.diagonal().mean()
    return gram + torch.eye(len(gram), device=gram.device) * (damp * torch.where(mean > 0, mean, 1.0))


def factor(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """R, float32 upper triangular, with R R^T = H + damp * mean(diag H) * I; and the damping, raised tenfold until that can be factored.

    Factored in float64, which costs half as much again. Errors: CheckpointError where H is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise CheckpointError("inputs of the layer are NaN or infinite; does the model run in float32?")
    turned = gram.double().flip(0, 1)
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(turned, damp))
        if not failed:
            return lower.flip(0, 1).float(), damp
        damp = max(1e-6, 10 * damp)


def towards_dense(weight: Tensor, moments: Moments, damp: float) -> Tensor:
    """The weight, float32, whose outputs for the inputs as they are now come closest to those of `weight` for the inputs of the dense model.

    Least squares: with C the mean of x_dense x^T, the minimum over V of the mean |W x_dense - V x|^2 + damp * |V - W|^2 is V = W + W (C - H) (H + damp I)^-1.
    `weight` itself where there is no `moments.cross`.
    """
    if moments.cross is None:
        return weight.float()
    gram = damped(moments.gram.double(), damp)
    w = weight.double()
    shift = torch.linalg.solve(gram, (w @ (moments.cross.double() - moments.gram.double())).T).T
    target: Tensor = (w + shift).float()
    return target
