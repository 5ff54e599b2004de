"""The CUDA kernels against cuBLAS in bf16, torch's int4 operator and the memory's own speed, on one GPU, in one run of some minutes.

    python benchmarks/kernels_cuda.py [--bits 4] [--group-size 128] [--tokens 1 16 256] [--layers 8b] [--csv kernels_cuda.csv]

Not run yet: no GPU was at hand. How it measures, and why:

- A CUDA graph of 20 calls, 10 replays to warm up and the median of 50: launches from Python would hide everything below 10 us.
- The calls go through copies of the weight in turn, as many as make 240 MB and at least 4, so that no L2 (50 to 60 MB) still holds what comes next.
- Random codes: a matrix of zeros draws less power and runs faster than real ones.
- The ceilings are measured first, in the same process: copying (bytes read and written) and a large bf16 product. The floor of a layer is what is larger,
  its bytes at the speed of copying or its operations at that of the product; `of floor` is floor / time.
- The intercept: time against bytes over the layers at one token, a straight line by least squares. What is left at no bytes is launching, not the kernel.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, product
from statistics import median

import torch
from torch import Tensor

from quant.formats.bits import words
from quant.kernels import cuda
from quant.kernels.library import library

LAYERS = {  # [outputs, inputs]
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (128256, 4096)},
    "70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
CALLS, WARM, REPLAYS = 20, 10, 50
ROTATED = 240e6  # bytes
COLUMNS = ("layer", "outputs", "inputs", "tokens", "way", "us", "GB/s", "of floor", "of copying", "times bf16")

Call = Callable[[], object]


def microseconds(calls: Sequence[Call]) -> float:
    """The time of one call of those that are made in turn, in a graph."""
    for call in calls[:2]:
        call()  # what is made at first use is not for the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), max(CALLS, len(calls))):
            call()
    times = []
    for replay in range(WARM + REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARM:
            times.append(start.elapsed_time(end) * 1e3 / max(CALLS, len(calls)))
    return median(times)


def copying() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.randint(-128, 128, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) * 1e6


def multiplying() -> float:
    """Operations a second of a large bf16 product."""
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / microseconds([lambda: torch.mm(a, b, out=out)]) * 1e6


def copies(size: int) -> int:
    """How many of a weight of so many bytes are gone through in turn."""
    return max(4, int(-(-ROTATED // size)))


def packed_calls(x: Tensor, rows: int, bits: int, group: int, tokens: int) -> tuple[list[Call], int]:
    """Products from random codes, by the kernel up to `tokens` tokens and beyond that by unpacking; and the bytes of one weight."""
    opened = library("cuda")
    width = x.shape[1]
    size = rows * words(width, bits) * 4 + rows * (width // group) * 2
    calls: list[Call] = []
    for _ in range(copies(size)):
        codes = torch.randint(-(1 << 31), 1 << 31, (rows, words(width, bits)), dtype=torch.int64, device="cuda").int()
        scale = torch.rand((rows, width // group), device="cuda").to(x.dtype) / 100

        def call(codes: Tensor = codes, scale: Tensor = scale) -> object:
            return cuda.multiplied(opened, cuda._stream(x), x, codes, scale, None, bits, group, tokens)

        calls.append(call)
    return calls, size


def dense_calls(x: Tensor, rows: int) -> tuple[list[Call], int]:
    """cuBLAS."""
    size = rows * x.shape[1] * 2
    weights = [torch.randn((rows, x.shape[1]), device="cuda", dtype=x.dtype) for _ in range(copies(size))]
    out = torch.empty((len(x), rows), device="cuda", dtype=x.dtype)

    def call_of(weight: Tensor) -> Call:
        return lambda: torch.mm(x, weight.T, out=out)

    return [call_of(weight) for weight in weights], size


def torch_int4_calls(x: Tensor, rows: int, group: int) -> tuple[list[Call], int]:
    """torch's own operator for 4 bits, with zero points as it wants them."""
    width = x.shape[1]
    size = rows * width // 2 + rows * (width // group) * 4

    def call_of() -> Call:
        codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand((width // group, rows, 2), device="cuda").to(x.dtype)
        return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)

    return [call_of() for _ in range(copies(size))], size


def ways(x: Tensor, rows: int, bits: int, group: int) -> Iterator[tuple[str, list[Call], int]]:
    """What is compared: a name, calls, and the bytes of one weight. The dense product is the first."""
    yield "cuBLAS bf16", *dense_calls(x, rows)
    if len(x) <= cuda.TOKENS:
        yield f"W{bits} codes", *packed_calls(x, rows, bits, group, cuda.TOKENS)
    yield f"W{bits} unpacked", *packed_calls(x, rows, bits, group, 0)
    if bits == 4:
        yield "torch int4", *torch_int4_calls(x, rows, group)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--layers", choices=LAYERS, nargs="*", default=list(LAYERS))
    parser.add_argument("--csv", default="")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or library("cuda") is None:
        sys.exit("this needs a GPU, torch with CUDA, and libmergekit_plus_cuda.so")
    bits, group = arguments.bits, arguments.group_size
    bandwidth, operations = copying(), multiplying()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s, multiplies bf16 at {operations / 1e12:.0f} TFLOP/s\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    table: list[tuple[object, ...]] = []
    at_one: list[tuple[float, float]] = []
    layers = [(f"{model} {name}", *sizes) for model in arguments.layers for name, sizes in LAYERS[model].items()]
    for (name, rows, width), tokens in product(layers, arguments.tokens):
        x = torch.randn((tokens, width), device="cuda", dtype=torch.bfloat16)
        moving, computing = 2 * tokens * (width + rows), 2 * tokens * rows * width / operations
        bf16 = 0.0
        for way, calls, size in ways(x, rows, bits, group):
            us = microseconds(calls)
            bf16 = bf16 or us
            floor, speed = max((size + moving) / bandwidth, computing) * 1e6, (size + moving) / us * 1e6
            ratios = (floor / us, speed / bandwidth, bf16 / us)
            table.append((name, rows, width, tokens, way, f"{us:.1f}", f"{speed / 1e9:.0f}", *(f"{ratio:.2f}" for ratio in ratios)))
            print("|", " | ".join(map(str, table[-1])), "|", flush=True)
            if tokens == 1 and way.endswith("codes"):
                at_one.append((size + moving, us))
            del calls  # and with them the weights, before the next are made
    if len(at_one) > 1:
        intercept, slope = line(at_one)
        print(f"\nW{bits} at one token: {intercept:.1f} us and {1e-6 / slope:.2f} TB/s")
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])


if __name__ == "__main__":
    main()
