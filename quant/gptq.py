"""GPTQ: each column of a weight is rounded so that it makes up for what the columns before it did to the layer's output.

With H the mean of x x^T over the inputs of a calibration text, codes of least tr((W - Q) H (W - Q)^T) are sought, the mean squared error of the layer's
output. Let the columns stand in the order in which they are rounded, and H = R R^T with R upper triangular. Then the error is

    sum over k of R_kk^2 |e_k + sum over j < k of e_j R_jk / R_kk|^2,    e = W - Q, column by column,

so that column k, with the errors before it known, goes to the codes nearest to w_k + sum over j < k of e_j R_jk / R_kk. This is GPTQ (Frantar et al.,
GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2023), whose feedback is written with the Cholesky factor of H^-1, in the
form of LDLQ (Chee et al., QuIP, 2023, whose theorem 6 shows that both are the same): nothing is inverted.

Scales and zero points are fixed before the first column is rounded, each group at its place in the file ("static groups"). So columns may be taken in
any order, the inputs of greatest power first, and the file needs to hold none.

GPTQ stops there. Here scales and codes are then gone through again, by coordinate descent (`descent.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergekit_plus.moments import Moments

from .descent import descend
from .gram import damped, factor, towards_dense
from .quantized import Quantized, Scheme
from .quantizer import quantizer
from .rtn import Clip, rtn

UNSEEN = "no token reached it: rounded to nearest"
LEAF = 32  # columns rounded one by one between matrix products

Damp = Annotated[float, Field(ge=0, le=1, description="power added to each input, as a part of the mean power of all inputs")]
Sweeps = Annotated[int, Field(ge=0, le=100, description="times that all scales and codes are gone through again afterwards; 0: GPTQ as it was published")]
ActOrder = Annotated[bool, Field(description="round the inputs of greatest power first, rather than in the order of the file")]


@quantizer("gptq", calibrated=True)
def gptq(
    weight: Tensor, scheme: Scheme, moments: Moments, *, damp: Damp = 0.01, act_order: ActOrder = True, sweeps: Sweeps = 4, clip: Clip = 6
) -> Quantized:
    """Round the columns of a weight one after the other, each making up for the errors of those before it (GPTQ), then descend from there.

    weight: [out, in], whole, bfloat16, float16, float32 or float64. The scales have its dtype, and codes are decided against the scales as stored. With
    `moments.cross`, the output aimed at is that of the model that nothing was done to. Where no token reached the layer the result is that of `rtn`, and
    where the Gram matrix cannot be factored its damping is raised tenfold until it can; the `note` of the result says so.
    """
    if not moments.tokens:
        return replace(rtn(weight, scheme, clip=clip), note=UNSEEN)
    power = moments.gram.diagonal()
    order = power.argsort(descending=True, stable=True) if act_order else torch.arange(len(power), device=power.device)
    root, used = factor(moments.gram[order][:, order], damp)
    target = towards_dense(weight, moments, used)
    start = rtn(target.to(weight.dtype), scheme, clip=clip)
    found = replace(start, codes=_round(target, weight == 0, start, root, order, scheme), note=raised(damp, used))
    return descend(target, weight == 0, found, damped(moments.gram, used), scheme, sweeps)


def raised(damp: float, used: float) -> str:
    """What a user should know of the damping; nothing where it is as asked for."""
    return f"damping raised from {damp:g} to {used:g} to factor the Gram matrix" if used != damp else ""


def _round(target: Tensor, zero: Tensor, start: Quantized, root: Tensor, order: Tensor, scheme: Scheme) -> Tensor:
    """The codes, int8 [out, in], for the scales and zero points of `start`, with the columns rounded in `order`; `root`: R of H in that order.

    What is `zero` stays so: a pruned weight makes up for nothing.
    """
    zero = zero.T[order]
    error = target.T[order]  # [in, out] in order, so that a column lies in one piece: the weight until it is rounded, what is left of it after
    aim = error.clone()  # the weight and what is to be made up for
    steps = torch.empty_like(error)  # codes less the zero point
    feedback = root / root.diagonal()  # [in, in]: row j is what the error of column j adds to later columns
    scale = start.scale.float().T.contiguous()  # [groups, out]
    low, high = (torch.full_like(scale, float(end)) for end in (scheme.low, scheme.high))
    if start.zero_point is not None:
        low, high = low - start.zero_point.T, high - start.zero_point.T
    scales, lows, highs, pruned = scale.unbind(), low.unbind(), high.unbind(), bool(zero.any())
    group = (order // (target.shape[1] // len(scale))).tolist()

    def carry_over(first: int, middle: int, last: int) -> None:
        aim[middle:last].addmm_(feedback[first:middle, middle:last].T, error[first:middle])

    def solve(first: int, last: int) -> None:
        for k, a, s, e in zip(range(first, last), aim[first:last], steps[first:last], error[first:last], strict=True):
            g = group[k]
            torch.clamp(torch.div(a, scales[g], out=s).round_(), lows[g], highs[g], out=s)
            if pruned:
                s.masked_fill_(zero[k], 0)
            e.addcmul_(s, scales[g], value=-1)
            aim[k + 1 : last].addr_(feedback[k, k + 1 : last], e)

    _halves(0, len(error), solve, carry_over)
    codes = torch.empty_like(steps)
    codes[order] = steps
    codes = codes.T
    if start.zero_point is not None:
        codes = (codes.reshape(*start.scale.shape, -1) + start.zero_point.unsqueeze(-1)).flatten(-2)
    return codes.to(torch.int8).contiguous()


def _halves(first: int, last: int, solve: Callable[[int, int], None], carry_over: Callable[[int, int, int], None]) -> None:
    """Solve one half after the other, down to leaves. Not a function inside of another: one that calls itself keeps its tensors until garbage is collected."""
    if last - first <= LEAF:
        solve(first, last)
        return
    middle = (first + last) // 2
    _halves(first, middle, solve, carry_over)
    carry_over(first, middle, last)
    _halves(middle, last, solve, carry_over)
