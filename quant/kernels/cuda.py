"""The operators on CUDA: csrc/cuda through ctypes, on torch's current stream.

Up to 64 tokens of float16 or bfloat16 the kernel multiplies the stored codes on tensor cores. Beyond, and at widths and groups that it does not have, a kernel
unpacks the weight, all of it, and torch's own product takes it. What neither takes (float64, a machine where nothing was compiled, a GPU older than sm_80) the
reference does; nothing here raises for want of a kernel.
"""

from __future__ import annotations

import logging
from ctypes import CDLL, byref
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from . import ops, reference
from .library import DTYPES, FAILED, OK, Rows, Signs, Weight, library

TOKENS = 64  # that the kernel takes at once; 0 for none, in benchmarks
LEAST = 1 << 20  # bytes of a workspace, so that it seldom grows
LOG = logging.getLogger(__name__)

# By device and stream: kernels of one stream run one after another and may share a workspace; those of two may not. And the capture into a graph that it was
# made in, -1 for none: zeroing it is then a part of that graph, and it is no workspace for anything else.
WORKSPACES: dict[tuple[int | None, int], tuple[int, Tensor]] = {}


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """As quant.kernels.packed_linear, whose shapes it believes."""
    opened = library("cuda")
    if opened is not None and all(tensor is None or tensor.device == x.device for tensor in (packed, scale, zero_point)):
        with torch.cuda.device(x.device):
            found = multiplied(opened, _stream(x), x, packed, scale, zero_point, bits, group_size)
        if found is not None:
            return found
    return reference.packed_linear(x, packed, scale, zero_point, bits, group_size)


def signs_linear(x: Tensor, signs: Tensor, width: int, transposed: bool) -> Tensor:
    """As quant.kernels.signs_linear, whose shapes it believes."""
    return _signs_linear(x, signs, None, width, transposed)


def signs_linear_batched(x: Tensor, signs: Tensor, owner: Tensor, width: int, transposed: bool) -> Tensor:
    """As quant.kernels.signs_linear_batched, whose shapes it believes."""
    return _signs_linear(x, signs, owner, width, transposed)


def _signs_linear(x: Tensor, signs: Tensor, owner: Tensor | None, width: int, transposed: bool) -> Tensor:
    opened = library("cuda")
    if opened is not None and signs.device == x.device and (owner is None or owner.device == x.device):
        with torch.cuda.device(x.device):
            found = signed(opened, _stream(x), x, signs, owner, width, transposed)
        if found is not None:
            return found
    if owner is None:
        return reference.signs_linear(x, signs, width, transposed)
    return reference.signs_linear_batched(x, signs, owner, width, transposed)


def multiplied(
    opened: CDLL, stream: int, x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, tokens: int = TOKENS
) -> Tensor | None:
    """`x W^T` by the kernels of a library on a stream; up to `tokens` of them from the codes. None where it has no kernel."""
    if x.dtype not in DTYPES or scale.dtype not in DTYPES:
        return None
    width, out = x.shape[-1], x.new_empty((*x.shape[:-1], packed.shape[0]))
    if not out.numel() or not width:
        return out.zero_()
    packed, scale = _dense_rows(packed), _dense_rows(scale)
    zero_point = None if zero_point is None else zero_point.contiguous()
    weight = Weight.of(packed, scale, zero_point, bits, group_size, width)
    rows, y = x.reshape(-1, width), out.view(-1, packed.shape[0])
    if len(rows) <= tokens and x.dtype != torch.float32:
        size = int(opened.mkp_cuda_workspace(byref(weight), len(rows)))
        if size >= 0:
            rows = _aligned(rows)
            workspace = _workspace(opened, x.device, stream, size) if size else None
            pointer, held = (workspace.data_ptr(), workspace.nbytes) if workspace is not None else (None, 0)
            if _done(opened, opened.mkp_cuda_linear(byref(weight), byref(Rows.of(rows)), byref(Rows.of(y)), pointer, held, stream)):
                return out
    dense = torch.empty((weight.n, width), dtype=x.dtype, device=x.device)
    if not _done(opened, opened.mkp_cuda_dequantize(byref(weight), byref(Rows.of(dense)), stream)):
        return None
    return functional.linear(x, dense)


def signed(opened: CDLL, stream: int, x: Tensor, signs: Tensor, owner: Tensor | None, width: int, transposed: bool) -> Tensor | None:
    """`x S^T`, or `x S`, by the kernels of a library on a stream, float32; S is the owner's of each row, or the only one. None where it has no kernel."""
    if x.dtype not in DTYPES or signs.dtype != torch.uint8:
        return None
    out = torch.empty((*x.shape[:-1], width if transposed else signs.shape[-2]), dtype=torch.float32, device=x.device)
    if not out.numel() or not x.numel() or not signs.numel():
        return out.zero_()
    rows, signs = _dense_rows(x.reshape(-1, x.shape[-1])), signs if signs.stride(-1) == 1 else signs.contiguous()
    owner = None if owner is None else owner.to(torch.int32).contiguous()
    one = signs if owner is None else signs[0]
    owners = (None, 0, 0) if owner is None else (owner.data_ptr(), len(signs), signs.stride(0))
    run = opened.mkp_cuda_signs_transposed if transposed else opened.mkp_cuda_signs
    done = _done(opened, run(byref(Signs.of(one, width)), *owners, byref(Rows.of(rows)), byref(Rows.of(out.view(-1, out.shape[-1]))), stream))
    return out if done else None


def _stream(x: Tensor) -> int:
    """The handle of torch's current stream; the private name is what other libraries use too, ten times as quick as an object."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(x.device.index)) if raw is not None else int(torch.cuda.current_stream(x.device).cuda_stream)


def _workspace(opened: CDLL, device: torch.device, stream: int, size: int) -> Tensor:
    """A workspace of at least so many bytes for a stream, zeroed when it was made."""
    capture = int(opened.mkp_cuda_capture(stream))
    made_in, workspace = WORKSPACES.get((device.index, stream), (None, None))
    if workspace is None or made_in != capture or workspace.nbytes < size:
        workspace = torch.zeros(max(size, LEAST), dtype=torch.uint8, device=device)
        WORKSPACES[device.index, stream] = (capture, workspace)
    return workspace


def _dense_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows have no gaps between elements."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _aligned(rows: Tensor) -> Tensor:
    """Rows [m, K] of 16-bit floats that can be copied 16 bytes at a time: themselves, or a copy whose rows end in zeros."""
    width = rows.shape[1]
    if rows.stride(1) == 1 and rows.stride(0) >= width and not (rows.data_ptr() % 16 or rows.stride(0) % 8 or width % 8):
        return rows
    copy = rows.new_zeros((len(rows), width + -width % 8))
    copy[:, :width] = rows
    return copy


def _done(opened: CDLL, status: int) -> bool:
    """Whether a kernel was launched; an error of the device is told once."""
    if status == FAILED:
        _failed(opened.mkp_cuda_error().decode())
    return status == OK


@cache
def _failed(why: str) -> None:
    LOG.warning("a CUDA kernel could not be launched (%s). Packed weights work all the same, in plain torch, slower.", why)


ops.LIBRARY.impl("packed_linear", packed_linear, "CUDA")
ops.LIBRARY.impl("signs_linear", signs_linear, "CUDA")
ops.LIBRARY.impl("signs_linear_batched", signs_linear_batched, "CUDA")
