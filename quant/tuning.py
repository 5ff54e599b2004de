"""Statistics tuning: codes stay, and what else there is of a layer, scales of rows and biases, is set so that its output's statistics are right again.

The CalibTIP pipelines (Hubara et al., Accurate Post Training Quantization With Small Calibration Sets, ICML 2021, section 3.3) measure the statistics of the
quantised model in its batch norms and fold them into weights. Transformers have none, so that the outputs of linear layers are set right themselves; and by least
squares, which the matching of variances cannot beat: an output that rounding has shrunk is further off once it has the right variance.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_plus.moments import Moments

from .quantized import Quantized, Scheme, dequantize
from .rtn import storable


def rescale_rows(weight: Tensor, quantized: Quantized, moments: Moments) -> Quantized:
    """All scales of a row times the factor by which its output comes closest to the dense one: mean(y y') / mean(y' y'), y' the quantised output.

    Codes and zero points stay. A row keeps its scales where those that can be stored are no better.
    """
    gram = moments.gram.double()
    aim = (moments.gram if moments.cross is None else moments.cross).double()
    w, q = weight.double(), dequantize(quantized).double()
    common, power = (w @ aim * q).sum(-1), (q @ gram * q).sum(-1)
    factor = torch.where(power > 0, common / power, 1.0)
    scheme = Scheme(quantized.bits, 0, quantized.zero_point is None)
    scale = storable((quantized.scale.double() * factor.unsqueeze(-1)).float(), scheme, quantized.scale.dtype).to(quantized.scale.dtype)
    tried = dequantize(replace(quantized, scale=scale)).double()
    better = (tried @ gram * tried).sum(-1) - 2 * (w @ aim * tried).sum(-1) < power - 2 * common
    return replace(quantized, scale=torch.where(better.unsqueeze(-1), scale, quantized.scale))


def bias_correction(weight: Tensor, quantized: Quantized, moments: Moments) -> Tensor:
    """What to add to the layer's bias, float32 [out], so that the mean of its outputs is that of the dense layer for the same inputs: (W - Q) mean(x)."""
    correction: Tensor = ((weight.double() - dequantize(quantized).double()) @ moments.mean.double()).float()
    return correction


def centred(moments: Moments) -> Moments:
    """The same with the covariance for the Gram matrix: what a quantiser is to be told of a layer whose bias is corrected afterwards.

    |E x + b|^2 has the mean E C E^T for the best b, with C the covariance of x. Errors: ValueError for moments with `cross`, whose other mean is unknown.
    """
    if moments.cross is not None:
        raise ValueError("moments with `cross` cannot be centred: they lack the mean of the dense inputs")
    mean = moments.mean.double()
    return replace(moments, gram=(moments.gram.double() - torch.outer(mean, mean)).float())
