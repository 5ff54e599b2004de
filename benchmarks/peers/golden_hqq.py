"""Writes tests/quant/golden_hqq.safetensors: what the steps of hqq 0.2.8 make of groups whose min-max spacing is 1.

    VENV/bin/python golden_hqq.py

Of each width: the groups, and after each step of the program their codes and their zero points, which are no integers there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy_step as step
from safetensors.torch import save_file

STEPS = 20
generator = torch.Generator().manual_seed(0)
golden = {}
for bits in (2, 3, 4):
    highest = 2**bits - 1
    groups = torch.randn(6, 64, generator=generator)
    groups[:, 5] *= 3  # an outlier
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    groups = groups / ((high - low) / highest)
    scale, zero, beta = torch.ones(6, 1), -groups.amin(1, keepdim=True), 10.0
    codes, zeros = [], [zero]
    for _ in range(STEPS):
        _, code, zero, scale = step(groups, scale, zero, [0, highest], beta, 0.75, 1)
        codes.append(code.to(torch.uint8))
        zeros.append(zero)
        beta *= 1.01
    golden |= {f"{bits}.groups": groups, f"{bits}.codes": torch.stack(codes), f"{bits}.zeros": torch.stack(zeros)}
save_file(golden, Path(__file__).parents[2] / "tests" / "quant" / "golden_hqq.safetensors")
