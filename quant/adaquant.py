"""AdaQuant: weights, scales and zero points are trained together for the output of one layer.

    minimise |W x - Q(W + V) x|^2 over V, the scales and the zero points

(Hubara et al., Accurate Post Training Quantization With Small Calibration Sets, ICML 2021, section 3.1; the authors' code is itayhubara/CalibTIP). V may carry
a weight over any number of steps. Gradients go straight through the rounding, and are zero for weights beyond the last code.

As only weights are quantised here, the loss is tr((W - Q) H (W - Q)^T), and a step needs not the inputs themselves, but H, the mean of x x^T, damped as in
`gptq`. Where this differs from the authors' code: one full gradient a step, rather than one of 50 random inputs; learning rates in steps of the quantiser, so
that the result for c W is c times that for W, and falling to zero; scales are compared as they are stored; the best iterate of each row is kept, not the last.
The ranges of quantised inputs are not trained. A bias is, where H is the covariance (`tuning.centred`), which is what the best bias leaves of the loss, and
that bias is set then (`tuning.bias_correction`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_plus.moments import Moments

from .gptq import UNSEEN, Damp, gptq, raised
from .gram import damped, factor, towards_dense
from .quantized import Quantized, Scheme
from .quantizer import quantizer
from .rtn import Clip, rtn, storable

BETAS = (0.9, 0.999)  # Adam's
EDGE = 0.499  # how far from its code, in steps, a weight may begin

Rate = Annotated[float, Field(gt=0, le=1)]


@quantizer("adaquant", calibrated=True)
def adaquant(
    weight: Tensor,
    scheme: Scheme,
    moments: Moments,
    *,
    steps: Annotated[int, Field(ge=0, le=100_000, description="steps of Adam")] = 300,
    lr: Annotated[Rate, Field(description="how far a weight goes in one step at most, in steps between codes")] = 0.01,
    scale_lr: Annotated[Rate, Field(description="how far a scale goes in one step at most, as a part of it; and a zero point, in codes")] = 0.003,
    start: Annotated[Literal["rtn", "gptq"], Field(description="the method whose result it begins with")] = "rtn",
    damp: Damp = 0.01,
    clip: Clip = 6,
) -> Quantized:
    """Train weights, scales and zero points for the least error of the layer's output, the rounding passed straight through (AdaQuant).

    weight: [out, in], whole, bfloat16, float16, float32 or float64; the scales have its dtype. With `moments.cross`, the output aimed at is that of the model
    that nothing was done to (the paper's sequential mode, else its parallel one). No row ends with more error than it began with. Where no token
    reached the layer the result is that of `rtn`; the `note` of the result says so.
    """
    first = rtn(weight, scheme, clip=clip)
    if not moments.tokens:
        return replace(first, note=UNSEEN)
    _, used = factor(moments.gram, damp)
    if start == "gptq":
        first = gptq(weight, scheme, moments, damp=used, clip=clip)
    found = _train(towards_dense(weight, moments, used), weight == 0, first, damped(moments.gram, used), scheme, steps, (lr, scale_lr, scale_lr))
    return replace(found, note=raised(damp, used))


def _train(target: Tensor, zeros: Tensor, first: Quantized, gram: Tensor, scheme: Scheme, steps: int, rates: tuple[float, ...]) -> Quantized:
    """The best iterate of each row. Weights that are `zeros` stay so: they were pruned."""
    unit = first.scale.float().unsqueeze(-1)  # [out, groups, 1]
    w = target.view(*first.scale.shape, -1) / unit  # [out, groups, group], in steps of the first scale, as is `x`
    zero = torch.zeros_like(unit) if first.zero_point is None else first.zero_point.float().unsqueeze(-1)
    codes = first.codes.view_as(w).float()
    low, high = (torch.where(codes == end, end * torch.inf, codes + side * EDGE) for end, side in ((scheme.low, -1), (scheme.high, 1)))
    x = torch.minimum(torch.maximum(w, low - zero), high - zero)  # W + V: the least V that makes the first codes
    relative = torch.ones_like(unit)  # the scale, as a part of the first
    trained = [x, relative] if first.zero_point is None else [x, relative, zero]
    adam = [(torch.zeros_like(each), torch.zeros_like(each)) for each in trained]
    power = ((target @ gram) * target).sum(-1)
    power = torch.where(power > 0, power, 1.0).view(-1, 1, 1)  # [out, 1, 1]
    least = torch.full_like(power, torch.inf)
    best = [codes.clone(), unit.clone(), zero.clone()]
    for step in range(steps + 1):
        scale = storable(unit * relative, scheme, first.scale.dtype)
        loss, gradients, codes = loss_and_gradients(target, x, unit, scale, zero, gram, scheme)
        better = loss < least
        least = torch.where(better, loss, least)
        for kept, now in zip(best, (codes, scale, zero.round()), strict=True):
            torch.where(better, now, kept, out=kept)
        gradients[0].view_as(zeros).masked_fill_(zeros, 0.0)
        left = 1 - step / max(1, steps)
        for each, gradient, (mean, square), rate in zip(trained, gradients, adam, rates, strict=False):
            mean.lerp_(gradient / power, 1 - BETAS[0])
            square.lerp_((gradient / power).square_(), 1 - BETAS[1])
            size = (square / (1 - BETAS[1] ** (step + 1))).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            each.addcdiv_(mean, size, value=-left * rate / (1 - BETAS[0] ** (step + 1)))
        relative.clamp_min_(1e-3)
        zero.clamp_(scheme.low, scheme.high)
    codes, scale, zero = best
    zero_point = None if first.zero_point is None else zero.squeeze(-1).to(torch.int8)
    return Quantized(codes.flatten(1).to(torch.int8), scale.squeeze(-1).to(first.scale.dtype), zero_point, scheme.bits)


def loss_and_gradients(
    target: Tensor, x: Tensor, unit: Tensor, scale: Tensor, zero: Tensor, gram: Tensor, scheme: Scheme
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """e H e^T of each row [out, 1, 1]; its gradients by `x`, by the scale over `unit` and by `zero`; and the codes, float32.

    x: [out, groups, group], the weights in units of `unit` [out, groups, 1]; e = target - (codes - zero) scale; codes = clamp(round(x unit / scale) + zero).
    Roundings, of the zero point too, count as the identity.
    """
    place = x * (unit / scale)
    nearest, origin = place.round(), zero.round()
    codes = (nearest + origin).clamp_(scheme.low, scheme.high)
    steps = codes - origin
    inside = steps == nearest
    error = target - (steps * scale).flatten(1)
    pulled = error @ gram  # [out, in]
    loss = (pulled * error).sum(-1).view(-1, 1, 1)
    slope = pulled.view_as(x) * (-2 * unit)  # by the quantised weight, in units
    by_scale = (slope * (steps - place * inside)).sum(-1, keepdim=True)
    by_zero = -(slope * ~inside).sum(-1, keepdim=True) * (scale / unit)
    return loss, (slope * inside, by_scale, by_zero), codes
