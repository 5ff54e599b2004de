"""The CUDA kernels on this processor: csrc/cuda as it is shipped, compiled with emulation.h in the place of ptx.cuh, behind the same C functions."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_char_p, c_int, c_int64, c_size_t, c_void_p, memset
from pathlib import Path
from typing import Any

from quant.kernels.library import TAKES, Rows, Signs, Weight

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
SIZES = {0: 4, 1: 2, 2: 2}  # bytes of mkp_dtype
WIDTHS = (2, 3, 4, 8)
COUNTERS = 4 << 14  # bytes at the start of a workspace, which are zeros; the rest may be anything


def built(folder: Path, sources: Path = SOURCES, widths: tuple[int, ...] = WIDTHS, rest: Path | None = None) -> CDLL:
    """The library, compiled into a folder: eight small files, a few seconds. Of a folder where that was done before, all but some widths can be taken."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-I", str(HERE)]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-clobbered"]
    jobs = [(f"small_m_{bits}.o", sources / "small_m.cu", [f"-DMKP_BITS={bits}"]) for bits in widths]
    if rest is None:
        jobs += [(f"{path.stem}.o", path, []) for path in (sources / "dequantize.cu", sources / "onebit.cu", sources / "api.cu", HERE / "emulation.cpp")]

    def compiled(job: tuple[str, Path, list[str]]) -> str:
        name, source, more = job
        subprocess.run([compiler, *flags, *more, "-x", "c++", "-c", str(source), "-o", str(folder / name)], check=True)
        return str(folder / name)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    if rest is not None:
        objects += [str(path) for path in rest.glob("*.o") if not (folder / path.name).exists()]
    subprocess.run([compiler, "-shared", "-o", str(folder / "emulated.so"), *objects], check=True)
    return CDLL(str(folder / "emulated.so"))


class Emulated:
    """The C functions with the buffers of each call named to the emulator, which knows no others; what it finds wrong is an AssertionError."""

    def __init__(self, library: CDLL, order: int = 0, late: bool = False, multiprocessors: int = 1) -> None:
        self.library, self.how = library, (order, int(late), multiprocessors)
        for function, takes in TAKES["cuda"].items():
            getattr(library, f"mkp_cuda_{function}").argtypes = takes
        library.mkp_cuda_workspace.restype = library.mkp_cuda_capture.restype = c_int64
        library.emulate.argtypes = (c_int, c_int, c_int)
        library.emulate_buffer.argtypes = (c_void_p, c_size_t, c_int)
        library.emulate_error.restype = c_char_p
        library.emulate(*self.how)
        self.banks, self.launches = 1, 0

    def mkp_cuda_workspace(self, weight: Any, m: int) -> int:
        return int(self.library.mkp_cuda_workspace(weight, m))

    def mkp_cuda_capture(self, stream: int) -> int:
        return int(self.library.mkp_cuda_capture(stream))

    def mkp_cuda_linear(self, weight: Any, x: Any, y: Any, workspace: int | None, size: int, stream: int) -> int:
        w = weight._obj
        if workspace is not None:
            memset(workspace + COUNTERS, 0xFF, size - COUNTERS)  # NaN
        buffers = [*_weight(w), _rows(x._obj, w.k + -w.k % 8, 0), _rows(y._obj, w.n, 1), (workspace, size, 1)]
        return self._run("linear", buffers, weight, x, y, workspace, size, stream)

    def mkp_cuda_dequantize(self, weight: Any, out: Any, stream: int) -> int:
        return self._run("dequantize", [*_weight(weight._obj), _rows(out._obj, weight._obj.k, 1)], weight, out, stream)

    def mkp_cuda_signs(self, signs: Any, *more: Any) -> int:
        return self._signs("signs", signs, signs._obj.width, signs._obj.rows, *more)

    def mkp_cuda_signs_transposed(self, signs: Any, *more: Any) -> int:
        return self._signs("signs_transposed", signs, signs._obj.rows, signs._obj.width, *more)

    def _signs(self, name: str, signs: Any, inputs: int, outputs: int, owner: int | None, adapters: int, apart: int, x: Any, y: Any, stream: int) -> int:
        s: Signs = signs._obj
        size = max(0, adapters - 1) * apart + (s.rows - 1) * s.stride + -(-s.width // 8)
        buffers = [(s.bits, size, 0), (owner, 4 * x._obj.m, 0), _rows(x._obj, inputs, 0), _rows(y._obj, outputs, 1)]
        return self._run(name, buffers, signs, owner, adapters, apart, x, y, stream)

    def _run(self, name: str, buffers: list[tuple[int | None, int, int]], *arguments: Any) -> int:
        self.library.emulate(*self.how)
        for start, size, writable in buffers:
            if start is not None and size > 0:
                self.library.emulate_buffer(start, size, writable)
        status = int(getattr(self.library, f"mkp_cuda_{name}")(*arguments))
        assert self.library.emulate_error() == b""
        self.banks = max(self.banks, self.library.emulate_worst_bank())
        self.launches += self.library.emulate_launches()
        return status


def _weight(w: Weight) -> list[tuple[int | None, int, int]]:
    """The buffers of a weight: start, bytes, not to be written."""
    groups = -(-w.k // w.group_size)
    packed = (w.packed, 4 * ((w.n - 1) * w.packed_stride + -(-w.k * w.bits // 32)), 0)
    scale = (w.scale, SIZES[w.scale_dtype] * ((w.n - 1) * w.scale_stride + groups), 0)
    return [packed, scale, (w.zero_point, 4 * -(-w.n * w.bits // 32) * groups, 0)]


def _rows(rows: Rows, columns: int, writable: int) -> tuple[int | None, int, int]:
    return rows.data, SIZES[rows.dtype] * ((rows.m - 1) * rows.stride + columns), writable
