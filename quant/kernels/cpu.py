"""The operators on the CPU: csrc/cpu through ctypes, which lets other Python threads run meanwhile, on as many of OpenMP's threads as torch uses.

Up to DIRECT tokens, or MATRIX, the kernel multiplies the stored codes. Beyond that unpacking is the smaller part: the weight is unpacked by panels of rows,
and torch's own product takes them. What the kernels do not take (float64, a machine where nothing was compiled) the reference does.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor
from torch.nn import functional

from . import ops, reference
from .library import DTYPES, OK, Rows, Signs, Weight, library

DIRECT = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 16}  # tokens; matrix units make torch's bfloat16 product the faster one sooner
MATRIX = {torch.float32: 64, torch.float16: 64, torch.bfloat16: 128}  # the same where the kernel has matrix units itself
PANEL = 1 << 20  # weights that are unpacked at once: they stay in the second cache
AMX = 4
BEST = 99  # the fastest instruction set of the machine; mkp_isa's 0 scalar, 1 AVX2, 2 AVX-512, 3 with BF16, 4 AMX are for tests and benchmarks


def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, isa: int = BEST, direct: int | None = None
) -> Tensor:
    """As quant.kernels.packed_linear, whose shapes it believes; up to `direct` tokens from the codes, on a set up to `isa`; None is what is fastest."""
    opened = library("cpu")
    if opened is None or x.dtype not in DTYPES or scale.dtype not in DTYPES:
        return reference.packed_linear(x, packed, scale, zero_point, bits, group_size)
    width, out = x.shape[-1], x.new_empty((*x.shape[:-1], packed.shape[0]))
    if not out.numel() or not width:
        return out.zero_()
    rows, y = _rows(x), out.view(-1, packed.shape[0])
    packed, scale = _rows(packed), _rows(scale)
    zero_point = None if zero_point is None else zero_point.contiguous()
    weight = Weight.of(packed, scale, zero_point, bits, group_size, width)
    threads = torch.get_num_threads()
    if direct is None:
        matrix = bits == 4 and weight.n >= 32 and group_size % 32 == 0 and min(isa, opened.mkp_cpu_isa()) >= AMX
        direct = (MATRIX if matrix else DIRECT)[x.dtype]
    if len(rows) <= direct:
        _done(opened.mkp_cpu_linear(byref(weight), byref(Rows.of(rows)), byref(Rows.of(y)), threads, isa))
        return out
    # a panel begins at a whole word of zero points; float16 products are slow on most processors, and float32 ones are exact
    work = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    rows, each = rows.to(work), max(32, PANEL // width // 32 * 32)
    buffer = torch.empty((min(each, weight.n), width), dtype=work)
    count = weight.n
    for start in range(0, count, each):
        weight.n = min(each, count - start)
        panel = buffer[: weight.n]
        _done(opened.mkp_cpu_dequantize(byref(weight), byref(Rows.of(panel)), threads, isa))
        y[:, start : start + weight.n] = functional.linear(rows, panel)
        weight.packed += each * packed.stride(0) * 4
        weight.scale += each * scale.stride(0) * scale.element_size()
        if zero_point is not None:
            weight.zero_point += each * bits // 32 * zero_point.stride(0) * 4
    return out


def signs_linear(x: Tensor, signs: Tensor, width: int, transposed: bool, isa: int = BEST) -> Tensor:
    """As quant.kernels.signs_linear, whose shapes it believes."""
    opened = library("cpu")
    if opened is None or x.dtype not in DTYPES or signs.dtype != torch.uint8:
        return reference.signs_linear(x, signs, width, transposed)
    out = torch.empty((*x.shape[:-1], width if transposed else signs.shape[0]))
    if not out.numel() or not x.numel():
        return out.zero_()
    rows, signs = _rows(x), _rows(signs)
    run = opened.mkp_cpu_signs_transposed if transposed else opened.mkp_cpu_signs
    _done(run(byref(Signs.of(signs, width)), byref(Rows.of(rows)), byref(Rows.of(out.view(-1, out.shape[-1]))), torch.get_num_threads(), isa))
    return out


def _rows(tensor: Tensor) -> Tensor:
    """[rows, last], a view where the rows have no gaps between elements and begin where their dtype may."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 and not flat.data_ptr() % flat.element_size() else flat.contiguous()


def _done(status: int) -> None:
    if status != OK:
        raise MemoryError("the kernels' scratch memory could not be had")


ops.LIBRARY.impl("packed_linear", packed_linear, "CPU")
ops.LIBRARY.impl("signs_linear", signs_linear, "CPU")
