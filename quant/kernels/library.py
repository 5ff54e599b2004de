"""The compiled libraries: where they lie, whether they can be used, and the structs of csrc/include/mergekit_plus_kernels.h.

They stand in quant/kernels/lib, of a wheel or of a source tree that CMake built in. A library that is missing, or of another ABI, is named once, in a warning;
what it would have done is done by reference.py.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import CDLL, POINTER, Structure, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 1
OK, UNSUPPORTED, FAILED = range(3)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LOG = logging.getLogger(__name__)


class Weight(Structure):
    """`mkp_weight`."""

    _fields_ = (
        ("packed", c_void_p), ("scale", c_void_p), ("zero_point", c_void_p), ("n", c_int64), ("k", c_int64), ("group_size", c_int64),
        ("packed_stride", c_int64), ("scale_stride", c_int64), ("bits", c_int32), ("scale_dtype", c_int32),
    )  # fmt: skip

    @classmethod
    def of(cls, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, width: int) -> Weight:
        """The struct that points at stored tensors; zero points are contiguous, scales of a dtype in DTYPES, rows without gaps between elements."""
        zeros = None if zero_point is None else zero_point.data_ptr()
        return cls(
            packed.data_ptr(), scale.data_ptr(), zeros, packed.shape[0], width, group_size or max(1, width),
            packed.stride(0), scale.stride(0), bits, DTYPES[scale.dtype],
        )  # fmt: skip


class Rows(Structure):
    """`mkp_rows`."""

    _fields_ = (("data", c_void_p), ("m", c_int64), ("stride", c_int64), ("dtype", c_int32))

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """The struct that points at a matrix whose rows have no gaps between elements."""
        return cls(tensor.data_ptr(), tensor.shape[0], tensor.stride(0), DTYPES[tensor.dtype])


class Signs(Structure):
    """`mkp_signs`."""

    _fields_ = (("bits", c_void_p), ("rows", c_int64), ("width", c_int64), ("stride", c_int64))

    @classmethod
    def of(cls, signs: Tensor, width: int) -> Signs:
        """The struct that points at signs whose rows have no gaps between bytes."""
        return cls(signs.data_ptr(), signs.shape[0], width, signs.stride(0))


WEIGHT, ROWS, SIGNS = POINTER(Weight), POINTER(Rows), POINTER(Signs)
TAKES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {
        "linear": (WEIGHT, ROWS, ROWS, c_int32, c_int32), "dequantize": (WEIGHT, ROWS, c_int32, c_int32),
        "signs": (SIGNS, ROWS, ROWS, c_int32, c_int32), "signs_transposed": (SIGNS, ROWS, ROWS, c_int32, c_int32), "isa": (),
    },
    "cuda": {
        "linear": (WEIGHT, ROWS, ROWS, c_void_p, c_int64, c_void_p), "dequantize": (WEIGHT, ROWS, c_void_p),
        "signs": (SIGNS, c_void_p, c_int64, c_int64, ROWS, ROWS, c_void_p), "signs_transposed": (SIGNS, c_void_p, c_int64, c_int64, ROWS, ROWS, c_void_p),
        "workspace": (WEIGHT, c_int64), "capture": (c_void_p,),
    },
}  # fmt: skip


@cache
def library(device: str) -> CDLL | None:
    """The library for "cpu" or "cuda" with its prototypes; None, after a warning that says why, where there is none that can be used."""
    name = f"libmergekit_plus_{device}.so"
    path = next((path for path in (Path(root) / "lib" / name for root in _roots()) if path.exists()), None)
    if path is None:
        _missing(device, f"{name} was not built; it needs {'nvcc' if device == 'cuda' else 'a C++ compiler'} when mergekit-plus is installed")
        return None
    try:
        opened = CDLL(str(path))
    except OSError as error:
        _missing(device, f"{path} cannot be loaded ({error})")
        return None
    found = getattr(opened, f"mkp_{device}_abi")()
    if found != ABI:
        _missing(device, f"{path} is of ABI {found}, not {ABI}; build it again")
        return None
    for function, takes in TAKES[device].items():
        getattr(opened, f"mkp_{device}_{function}").argtypes = takes
    if device == "cuda":
        opened.mkp_cuda_error.restype = ctypes.c_char_p
        opened.mkp_cuda_workspace.restype = opened.mkp_cuda_capture.restype = c_int64
    return opened


def available() -> dict[str, bool]:
    """Which of the libraries can be used here."""
    return {device: library(device) is not None for device in TAKES}


def _roots() -> list[str]:
    """Everywhere that this package lies: an editable install may have two places."""
    import quant.kernels

    return list(quant.kernels.__path__)


def _missing(device: str, why: str) -> None:
    LOG.warning("no %s kernels: %s. Packed weights work all the same, in plain torch, slower.", "CPU" if device == "cpu" else "CUDA", why)
