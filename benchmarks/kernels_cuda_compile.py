"""Compiles the CUDA sources for each architecture and prints, in Markdown, what ptxas says of the kernels: registers, the most over dtypes, and spilled bytes.

    python benchmarks/kernels_cuda_compile.py                   every architecture that wheels are built for; minutes
    python benchmarks/kernels_cuda_compile.py 80 90a --bits 4   some of them, and one width of codes

Exits with 1 where a kernel spills. Needs nvcc only: on the PATH, as CUDACXX, or below /usr/local/cuda*.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
WIDTHS = (2, 3, 4, 8)


class Kernel(NamedTuple):
    """What ptxas says of a kernel."""

    name: str
    registers: int
    spilled: int  # bytes stored and loaded


def nvcc() -> str | None:
    """The compiler, None where there is none."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return found or next((str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)), None)


def compiled(compiler: str, source: str, architecture: str, *defines: str) -> list[Kernel]:
    """The kernels of a source file. Errors: CalledProcessError where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-std=c++17", "-O3", "-Werror", "all-warnings", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", *defines, "-o"]
        said = subprocess.run([*command, f"{folder}/out.cubin", str(HERE / source)], check=True, stderr=subprocess.PIPE, text=True).stderr
    return list(kernels(said))


def kernels(said: str) -> Iterator[Kernel]:
    """What `ptxas -v` wrote, kernel by kernel."""
    for part in said.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise ValueError(f"this is not what ptxas -v says of a kernel: {part}")
        yield Kernel(_readable(part.split("'")[0]), int(registers[1]), int(spills[1]) + int(spills[2]))


def _readable(mangled: str) -> str:
    """linear_kernel<4, Float::half, 1, true> as "4 bits, 8 tokens", whatever the dtype."""
    if found := re.search(r"linear_kernelILi(\d)ELNS_5FloatE\dELi(\d)ELb(\d)", mangled):
        bits, tiles, whole = map(int, found.groups())
        return f"{bits} bits, {8 * tiles} tokens{'' if whole else ', any groups'}"
    found = re.search(r"\d+([a-z_]+)_kernelI", mangled)
    return found[1].replace("_", " ") if found else mangled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--bits", type=int, nargs="*", default=WIDTHS)
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        sys.exit("no nvcc: put it on the PATH, or name it in CUDACXX")
    jobs = [("small_m.cu", f"-DMKP_BITS={bits}") for bits in arguments.bits] + [("dequantize.cu",), ("onebit.cu",), ("api.cu",)]
    table: dict[str, dict[str, Kernel]] = {}
    for architecture in arguments.architectures:
        for source, *defines in jobs:
            for kernel in compiled(compiler, source, architecture, *defines):
                row = table.setdefault(kernel.name, {})
                row[architecture] = max(kernel, row.get(architecture, kernel), key=lambda kernel: (kernel.spilled, kernel.registers))
    print("| kernel |", " | ".join(f"sm_{architecture}" for architecture in arguments.architectures), "|")
    print("|---|" + "---|" * len(arguments.architectures))
    for name, row in table.items():
        print(f"| {name} |", " | ".join(f"{kernel.registers}" + f", spills {kernel.spilled}" * bool(kernel.spilled) for kernel in row.values()), "|")
    return int(any(kernel.spilled for row in table.values() for kernel in row.values()))


if __name__ == "__main__":
    sys.exit(main())
