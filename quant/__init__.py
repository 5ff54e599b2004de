"""Quantisation: a quantiser makes codes, scales and zero points of a weight; a format stores them; `dequantize` undoes both."""

from .formats import FORMATS, Format, decode, read_config
from .gptq import gptq
from .hqq import hqq
from .quantized import Quantized, Scheme, dequantize
from .quantizer import QUANTIZERS, Quantizer, quantizer
from .rtn import rtn

__all__ = [
    "FORMATS",
    "QUANTIZERS",
    "Format",
    "Quantized",
    "Quantizer",
    "Scheme",
    "decode",
    "dequantize",
    "hqq",
    "gptq",
    "quantizer",
    "read_config",
    "rtn",
]
