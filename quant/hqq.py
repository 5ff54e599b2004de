"""HQQ: scales, and zero points, under which the errors of most weights are small and those of a few may be large; no data is looked at.

Least squares lets the outliers of a group decide. Badri and Shaji (Half-Quadratic Quantization of Large Machine Learning Models, 2023) take the sum of
|error|^p with p < 1 instead and split it: of the error e of each weight the part `shrink(e)`, nothing of a small one and most of a large one, is put down to an
outlier, and the rest is fitted by least squares; and again, with a slowly growing beta, from the codes that this gives.

Their program (hqq 0.2.8, core/optimize.py) moves the zero point, a number that is no integer, and leaves the scale at min-max. Formats that servers load
hold integer zero points, or none. So here the scale is fitted as well, and where codes are symmetric the scale alone: not by least squares, which shrink
all groups alike and cost more than all else gains (rtn.py says why), but so that the projection of the codes on what is fitted is kept. As beta belongs to
a size of errors, weights are taken in units of the min-max spacing; taken as they are, weights of the usual size have errors that are all shrunk to
nothing. And p is 3/4 instead of 0.7, since square roots are rounded alike wherever in a tensor a weight lies, which other powers are not.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .quantized import Quantized, Scheme
from .quantizer import quantizer
from .rtn import BLOCK, rtn, storable

BETA, KAPPA = 10.0, 1.01  # as in the program

Steps = Annotated[int, Field(ge=0, le=1000, description="times that the scale is fitted anew; the best one of each group is kept")]


@quantizer("hqq")
def hqq(weight: Tensor, scheme: Scheme, *, steps: Steps = 20) -> Quantized:
    """Fit each group's scale, and zero point, so that the sum of |error|^(3/4) is small (half-quadratic quantization).

    weight: [rows, in], bfloat16, float16, float32 or float64, of a shape that the scheme fits. The scales have its dtype, and each weight goes to the
    nearest code for its scale as stored. `steps=0` is `rtn` with `clip=0`.
    """
    rows, width = weight.shape
    if rows * scheme.groups(width) == 1:  # torch splits a sum that is alone among its threads, and rounds it otherwise
        return hqq(weight.expand(2, width), scheme, steps=steps).rows(slice(1))
    found = rtn(weight, scheme, clip=0)
    step = max(2, BLOCK // width)
    for start in range(0, max(1, rows - 1), step):
        block = slice(start, start + step if start + step < rows - 1 else rows)  # no row alone
        _fit_block(weight[block], scheme, steps, found.rows(block))
    return found


def _fit_block(weight: Tensor, scheme: Scheme, steps: int, found: Quantized) -> None:
    """Fit these rows, in place, from what min-max makes of them."""
    codes, scale, zero_point = found.codes, found.scale, found.zero_point
    unit = scale.float().unsqueeze(-1)  # [rows, groups, 1], as are all below that have no group
    x = weight.float().view(*scale.shape, -1) / unit  # [rows, groups, group]
    zero = torch.zeros_like(unit) if zero_point is None else zero_point.float().unsqueeze(-1)
    spacing = torch.ones_like(unit)
    best, best_zero, least = spacing, zero, torch.full_like(unit, torch.inf)
    beta = BETA
    for left in range(steps, -1, -1):
        code, target, loss = split(x, spacing, zero, scheme, beta)
        better = loss < least
        best, best_zero, least = torch.where(better, spacing, best), torch.where(better, zero, best_zero), torch.where(better, loss, least)
        if not left:
            break
        if zero_point is not None:
            zero = (code - target / spacing).mean(-1, keepdim=True).round_().clamp_(scheme.low, scheme.high)
        code -= zero
        spacing = torch.sum(target * target, -1, keepdim=True) / torch.sum(code * target, -1, keepdim=True)
        spacing = torch.where((spacing > 0.1) & (spacing < 10), spacing, best)  # also where all codes are zero
        beta *= KAPPA
    stored = torch.where(best == 1, unit, storable(best * unit, scheme, weight.dtype))
    code = (weight.float().view_as(x) / stored).round_().add_(best_zero).clamp_(scheme.low, scheme.high)
    codes.copy_(code.flatten(-2))
    scale.copy_(stored.squeeze(-1))
    if zero_point is not None:
        zero_point.copy_(best_zero.squeeze(-1))


def split(x: Tensor, spacing: Tensor, zero: Tensor, scheme: Scheme, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of each group of `x`, what of the weights is to be fitted by least squares, and the sum of |error|^(3/4)."""
    codes = (x / spacing + zero).round_().clamp_(scheme.low, scheme.high)
    error = x - (codes - zero) * spacing
    root = error.abs().sqrt_()
    quarter = root.sqrt()  # |error|^(1/4)
    shrunk = (error.abs() - 1 / (beta * quarter)).clamp_min_(0).copysign_(error)  # the proximal operator of |e|^p, to first order in 1/beta
    return codes, x - shrunk, torch.sum(root * quarter, -1, keepdim=True)
