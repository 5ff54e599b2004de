"""Biases set so that the outputs of a quantised layer have the mean that they had.

The bias tuning of CalibTIP (Hubara et al., Accurate Post Training Quantization With Small Calibration Sets, ICML 2021, section 3.3) in closed form. What else
it tunes, the variance of each output by the scale of its row, is in the coordinate descent of `gptq`: that moves the scale of each group to where the
squared error is least, and scales that match variances cannot be better than that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_plus.moments import Moments

from .quantized import Quantized, dequantize


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
