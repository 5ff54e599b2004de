"""safetensors dtype tags and torch dtypes, both ways. Tags that torch cannot hold travel as raw bytes (uint8)."""

from __future__ import annotations

import torch

from ..errors import OptionError, nearest
from .spec import FLOAT_DTYPES

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}

_FLOAT_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_SHORT_NAMES = {"fp16": "F16", "half": "F16", "bf16": "BF16", "fp32": "F32", "float": "F32"}


def parse_float_dtype(name: str) -> str:
    """The tag of a dtype as users write it: "bfloat16", "torch.bfloat16", "bf16", "BF16".

    Errors: OptionError for anything that is not a float dtype.
    """
    short = name.removeprefix("torch.").lower()
    known = {**_FLOAT_NAMES, **_SHORT_NAMES, **{tag.lower(): tag for tag in FLOAT_DTYPES}}
    if short not in known:
        raise OptionError(f"unknown dtype '{name}'.{nearest(short, _FLOAT_NAMES)}")
    return known[short]


def config_dtype(tag: str) -> str:
    """The name of a float tag in config.json: "bfloat16"."""
    return next(name for name, known in _FLOAT_NAMES.items() if known == tag)
