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
    NOTES = opened.metadata()
CASES: list[dict[str, Any]] = json.loads(NOTES["cases"])
RANDOM: dict[str, dict[str, Any]] = json.loads(NOTES["random"])
SEEDS = 100


def name(number: int) -> str:
    tensor = TENSORS[f"{number}.0"]
    return f"{CASES[number]['label']}-{str(tensor.dtype)[6:]}-{'x'.join(map(str, tensor.shape))}"


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("number", range(len(CASES)), ids=name)
def test_agrees_with_mergekit(number: int, rows: int | None) -> None:
    case = CASES[number]
    inputs = [TENSORS[f"{number}.{index}"] for index in range(case["inputs"])]
    expected = TENSORS[f"{number}.result"]
    base, models = (inputs[0], inputs[1:]) if case["base"] else (None, inputs)
    result = merge_tensors(case["method"], base, *models, rows=rows, **case["options"])
    assert result.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        # halfway between two bfloat16 values the last bit of float32 decides
        assert ((result.bfloat16() != expected).sum() <= max(1, expected.numel() // 100)).item()
    scale = torch.stack([tensor.float().abs() for tensor in (expected, *inputs)]).amax(0)
    assert bool(((result - expected.float()).abs() <= (2**-8 if expected.dtype == torch.bfloat16 else 1e-6) * scale).all())


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_as_much_as_mergekits_and_leave_as_much_in_the_mean(method: str) -> None:
    vector, options = TENSORS["random"], RANDOM[method]
    order = vector.abs().argsort(dim=1)
    given = {**options, "rescale": "l1"} if "epsilon" in options else options
    runs = torch.stack([merge_tensors(method, torch.zeros_like(vector), vector, seed=seed, **given) for seed in range(SEEDS)])
    left = (runs.double() / vector.double()).gather(2, order.expand_as(runs))  # [seeds, rows, columns], the columns from small to large
    stays = (left != 0).double()
    spread = 5 * (left.std((0, 1)) * (1 / (SEEDS * 40) + 1 / (200 * 40)) ** 0.5)
    assert bool(((left.mean((0, 1)) - TENSORS[f"{method}.left"]).abs() < spread + 0.01).all())
    assert bool(((stays.mean((0, 1)) - TENSORS[f"{method}.stays"]).abs() < 5 * (0.25 * (1 / (SEEDS * 40) + 1 / (200 * 40))) ** 0.5).all())
    # mergekit's factor restores the L1 norm every time, ours in expectation
    assert runs.abs().sum((1, 2)).mean().item() == pytest.approx(vector.abs().sum().item(), rel=0.01)


def test_the_golden_file_covers_every_deterministic_method_of_mergekit_in_two_dtypes() -> None:
    assert {case["method"] for case in CASES} == {
        "linear", "passthrough", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "task_arithmetic", "ties", "breadcrumbs",
        "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock",
    }  # fmt: skip
    assert set(RANDOM) == {"dare_linear", "dare_ties", "della_linear", "della"}
    assert {TENSORS[f"{number}.0"].dtype for number in range(len(CASES))} == {torch.float32, torch.bfloat16}
