"""Packed products on the CPU beside torch's own int4 operator, dense products, and the time that reading the bytes takes. The tables in docs/kernels.md.

    python benchmarks/kernels.py [--threads 1,2] [--tokens 1,2,4,8,16,32,64] [--shapes 4096x4096,...] [--seconds 2]

Everything of a line runs in turns in one process, each time on another copy of the weight, 64 MB of them and more, so that no cache of a core holds it; the
best time counts, for a busy machine can only add to it. "of reading" compares with the time in which the same threads read the same bytes and do nothing
else: a C loop, compiled here. torch's operator has a vector path for bfloat16 alone; with float32 it runs twice, and only with few tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from quant.formats.bits import pack
from quant.kernels import available, packed_linear, signs_linear

GROUP = 128
ROTATED = 64 << 20  # bytes
READER = """
#include <stdint.h>
int64_t read_all(const int64_t *from, int64_t count, int threads) {
  int64_t all = 0;
#pragma omp parallel for simd reduction(^ : all) num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) all ^= from[i];
  return all;
}
"""
Timed = dict[str, float]


def reader() -> Callable[[Tensor], int]:
    """A function that reads a tensor's memory with as many threads as torch uses."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "reader.c", Path(folder) / "reader.so"
        source.write_text(READER)
        subprocess.run(["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", out], check=True)
        opened = ctypes.CDLL(str(out))
    opened.read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return lambda tensor: int(opened.read_all(tensor.data_ptr(), tensor.nbytes // 8, torch.get_num_threads()))


def best(candidates: dict[str, Callable[[], object]], seconds: float, few: frozenset[str] = frozenset()) -> Timed:
    """The best time of each, in seconds; they take turns. Those of `few` run twice."""
    times: Timed = {}
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        for name, run in candidates.items():
            if name in few and turns >= 2:
                continue
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            times[name] = min(times.get(name, taken), taken)
        turns += 1
    return times


def copies(tensor: Tensor) -> list[Tensor]:
    """The tensor and copies of it, enough for ROTATED bytes."""
    return [tensor.clone() for _ in range(max(2, -(-ROTATED // tensor.nbytes)))]


@dataclass(frozen=True)
class Layer:
    """One weight in every form that is timed, several times."""

    packed: list[Tensor]
    scale: Tensor
    torchs: list[Tensor]
    dense: list[Tensor]

    @classmethod
    def of(cls, rows: int, width: int) -> Layer:
        """Random codes; the speed does not depend on them."""
        codes = torch.randint(-8, 8, (rows, width), dtype=torch.int8)
        scale = torch.rand(rows, width // GROUP) / 100
        dense = (codes.view(rows, -1, GROUP) * scale.unsqueeze(-1)).view(rows, width)
        torchs = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 2)
        return cls(copies(pack(codes, 4)), scale.bfloat16(), copies(torchs), copies(dense.bfloat16()))

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.packed[0].nbytes + self.scale.nbytes


def line(layer: Layer, tokens: int, dtype: torch.dtype, seconds: float, read: Callable[[Tensor], int]) -> Timed:
    """Times of one layer, number of tokens and dtype."""
    width = layer.dense[0].shape[1]
    x = torch.randn(tokens, width).to(dtype)
    zeros = torch.stack([layer.scale.float(), torch.zeros(layer.scale.shape)], -1).transpose(0, 1).contiguous().to(dtype)  # [groups, rows, 2]
    packed, torchs, again = cycle(layer.packed), cycle(layer.torchs), cycle(layer.packed)
    next(again)  # never the copy that was just multiplied
    dense = cycle(layer.dense if dtype == torch.bfloat16 else [weight.to(dtype) for weight in layer.dense[:2]])
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: packed_linear(x, next(packed), layer.scale, None, 4, GROUP),
        "read": lambda: read(next(again)),
        "dense": lambda: functional.linear(x, next(dense)),
    }
    if dtype == torch.bfloat16 or tokens * layer.packed[0].numel() <= 4 << 21:
        candidates["int4"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(torchs), GROUP, zeros)
    return best(candidates, seconds, frozenset() if dtype == torch.bfloat16 else frozenset({"int4"}))


def table(layers: dict[str, Layer], tokens: list[int], seconds: float, read: Callable[[Tensor], int]) -> None:
    """One table for each dtype."""
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\n{str(dtype).removeprefix('torch.')} activations, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}\n")
        print("| weight | tokens | ms | GB/s | of reading | torch int4 | dense |\n|---|---:|---:|---:|---:|---:|---:|")
        for name, layer in layers.items():
            for count in tokens:
                times = line(layer, count, dtype, seconds, read)
                ours = times["ours"]
                int4 = f"{times['int4'] / ours:.1f}x" if "int4" in times else "-"
                share = f"{times['read'] / ours * layer.nbytes / layer.packed[0].nbytes:.0%}"
                speed, dense = f"{layer.nbytes / ours / 1e9:.1f}", f"{times['dense'] / ours:.1f}x"
                print(f"| {name} | {count} | {ours * 1e3:.2f} | {speed} | {share} | {int4} | {dense} |", flush=True)


def widths(seconds: float) -> None:
    """Every width on a square weight with one token, and an adapter's two factors."""
    print(f"\n4096x4096, one token, bfloat16 activations, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}\n")
    print("| bits | symmetric, ms | GB/s | asymmetric, ms | GB/s |\n|---|---:|---:|---:|---:|")
    x, scale = torch.randn(1, 4096).bfloat16(), torch.rand(4096, 32).bfloat16()
    for bits in range(1, 9):
        packed = copies(torch.randint(-(1 << 31), (1 << 31) - 1, (4096, 128 * bits), dtype=torch.int32))
        zeros = torch.zeros(128 * bits, 32, dtype=torch.int32)
        one, two = cycle(packed), cycle(packed)
        times = best(
            {
                "symmetric": lambda one=one, bits=bits: packed_linear(x, next(one), scale, None, bits, GROUP),  # type: ignore[misc]
                "asymmetric": lambda two=two, zeros=zeros, bits=bits: packed_linear(x, next(two), scale, zeros, bits, GROUP),  # type: ignore[misc]
            },
            seconds,
        )
        print(f"| {bits} | " + " | ".join(f"{taken * 1e3:.2f} | {packed[0].nbytes / taken / 1e9:.1f}" for taken in times.values()) + " |", flush=True)
    a, b = (torch.randint(0, 256, (16, 512), dtype=torch.uint8) for _ in range(2))
    dense_a, dense_b = torch.randn(16, 4096).bfloat16(), torch.randn(4096, 16).bfloat16()
    times = best(
        {
            "signs": lambda: signs_linear(signs_linear(x, a, 4096), b, 4096, transposed=True),
            "dense": lambda: functional.linear(functional.linear(x, dense_a), dense_b),
        },
        seconds,
    )
    print(f"\nA one-bit adapter of rank 16 on 4096x4096, one token: {times['signs'] * 1e6:.0f} us; dense in bfloat16 {times['dense'] * 1e6:.0f} us")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x14336", help="outputs x inputs")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each line")
    options = parser.parse_args()
    if not available()["cpu"]:
        raise SystemExit("the CPU kernels were not built")
    shapes = {name: tuple(map(int, name.split("x"))) for name in options.shapes.split(",")}
    layers = {name: Layer.of(*shape) for name, shape in shapes.items()}
    read = reader()
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        table(layers, [int(count) for count in options.tokens.split(",")], options.seconds, read)
        widths(options.seconds)


if __name__ == "__main__":
    main()
