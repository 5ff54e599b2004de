"""Quantisation: a quantiser makes codes, scales and zero points of a weight; a format stores them; `dequantize` undoes both."""

from .adaquant import adaquant
from .formats import FORMATS, READERS, Format, decode, read_config
from .gptq import gptq
from .hqq import hqq
from .quantized import Quantized, Scheme, dequantize
from .quantizer import QUANTIZERS, Quantizer, quantizer
from .rtn import rtn

__all__ = [
    "FORMATS",
    "QUANTIZERS",
    "READERS",
    "Format",
    "Quantized",
    "Quantizer",
    "Scheme",
    "adaquant",
    "decode",
    "dequantize",
    "gptq",
    "hqq",
    "quantizer",
    "read_config",
    "rtn",
]
