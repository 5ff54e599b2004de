"""What mergekit 0.1.5 computed for small inputs, written by `benchmarks/parity_mergekit.py --write-golden`, we compute too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_toys import merge_tensors
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden_mergekit.safetensors"
TENSORS = load_file(GOLDEN)
with safe_open(GOLDEN, "pt") as opened:
    CASES: list[dict[str, Any]] = json.loads(opened.metadata()["cases"])


def name(number: int) -> str:
    tensor = TENSORS[f"{number}.0"]
    return f"{CASES[number]['label']}-{str(tensor.dtype)[6:]}-{'x'.join(map(str, tensor.shape))}"


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("number", range(len(CASES)), ids=name)
def test_agrees_with_mergekit(number: int, rows: int | None) -> None:
    case = CASES[number]
    inputs = [TENSORS[f"{number}.{index}"] for index in range(case["inputs"])]
    expected = TENSORS[f"{number}.result"]
    base, models = (None, inputs) if case["method"] == "linear" else (inputs[0], inputs[1:])
    result = merge_tensors(case["method"], base, *models, rows=rows, **case["options"])
    assert result.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        # halfway between two bfloat16 values the last bit of float32 decides
        assert ((result.bfloat16() != expected).sum() <= max(1, expected.numel() // 100)).item()
    scale = torch.stack([tensor.float().abs() for tensor in inputs]).amax(0)
    tolerance = 2**-8 if expected.dtype == torch.bfloat16 else 1e-5 if case["method"] == "slerp" else 1e-6
    assert bool(((result - expected.float()).abs() <= tolerance * scale).all())


def test_the_golden_file_covers_four_methods_in_two_dtypes() -> None:
    assert {case["method"] for case in CASES} == {"linear", "slerp", "task_arithmetic", "ties"}
    assert {TENSORS[f"{number}.0"].dtype for number in range(len(CASES))} == {torch.float32, torch.bfloat16}
