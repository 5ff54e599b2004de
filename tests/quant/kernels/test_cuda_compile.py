"""The CUDA sources compile where there is an nvcc, and nothing spills; benchmarks/kernels_cuda_compile.py asks that of every architecture and width."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "kernels_cuda_compile.py"))
NVCC = SCRIPT["nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH, in CUDACXX or below /usr/local")


@needs_nvcc
@pytest.mark.parametrize(
    ("architecture", "source", "count"), [("90a", "small_m.cu", 10), ("80", "dequantize.cu", 3), ("80", "onebit.cu", 6), ("80", "api.cu", 0)]
)
def test_sources_compile_without_a_warning_or_a_spill(architecture: str, source: str, count: int) -> None:
    kernels = SCRIPT["compiled"](NVCC, source, architecture, "-DMKP_BITS=4")
    assert len(kernels) == count
    assert [kernel for kernel in kernels if kernel.spilled] == []


def test_what_ptxas_says_is_read() -> None:
    name = "_ZN3mkp53_GLOBAL__N__8a63d0e7_10_small_m_cu_linear13linear_kernelILi4ELNS_5FloatE1ELi2ELb1EEEvNS_6LinearE"
    said = f"""ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for _ZN3mkp
    0 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 512 bytes cmem[0]
"""
    assert list(SCRIPT["kernels"](said)) == [("4 bits, 16 tokens", 168, 64)]
