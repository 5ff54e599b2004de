"""Norm tweaking: the norms of a block are trained until its outputs have the statistics that they had before its linear layers were quantised.

Li et al., Norm Tweaking: High-performance Low-bit Quantization of Large Language Models (AAAI 2024): for each channel of a block's output, the mean and the
variance are compared with those of the model that nothing was done to. Norms are stored as they are, so that this costs no bit and no format knows of it.
Where this differs: the text is the user's calibration text, not one that the model wrote; both differences are relative; the learning rate is the same for all
blocks; and a block whose statistics end no nearer keeps its norms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_plus.calibration import Block
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES

from .inner import Inner

RATE = 1e-3  # of Adam


def tweak_norms(block: Block, norms: Mapping[str, Inner], passes: int) -> dict[str, Tensor]:
    """These norms of a block, as they are stored, after `passes` times the calibration text: a step of Adam for each batch. The module has them then.

    Of a walk with `cross`, after the linear layers were quantised.
    """
    if not norms:
        return {}
    inside = {name: block.module.get_parameter(norm.inside) for name, norm in norms.items()}
    dtypes = {name: TORCH_DTYPES[norm.spec.dtype] for name, norm in norms.items()}
    goals = [_statistics(states) for states in block.dense_outputs()]
    before = {name: parameter.detach().clone() for name, parameter in inside.items()}
    start = _distance(block, goals)
    _train(block, list(inside.values()), goals, passes)
    with torch.no_grad():
        for name, parameter in inside.items():
            parameter.copy_(parameter.to(dtypes[name]))
        if not _distance(block, goals) < start:
            for name, parameter in inside.items():
                parameter.copy_(before[name])
        return {name: parameter.to("cpu", dtypes[name]) for name, parameter in inside.items()}


def _train(block: Block, norms: list[nn.Parameter], goals: list[tuple[Tensor, Tensor]], passes: int) -> None:
    for norm in norms:
        norm.requires_grad_(True)
    optimizer = torch.optim.Adam(norms, lr=RATE)
    with torch.enable_grad():
        for _ in range(passes):
            for number, (states, goal) in enumerate(zip(block.inputs, goals, strict=True)):
                optimizer.zero_grad()
                _difference(block.forward(number, states), goal).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    for norm in norms:
        norm.requires_grad_(False)


def _statistics(states: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each channel, over the tokens of a batch."""
    tokens = states.float().flatten(0, -2)
    return tokens.mean(0), tokens.var(0, correction=0)


def _difference(states: Tensor, goal: tuple[Tensor, Tensor]) -> Tensor:
    """How far the statistics are from those wanted: of the means in typical deviations, of the variances in typical variances."""
    mean, variance = _statistics(states)
    wanted_mean, wanted_variance = goal
    typical = wanted_variance.mean()
    return (mean - wanted_mean).abs().mean() / typical.sqrt() + (variance - wanted_variance).abs().mean() / typical


def _distance(block: Block, goals: list[tuple[Tensor, Tensor]]) -> float:
    """The mean difference over the text, with the module as it is now."""
    with torch.no_grad():
        return sum(float(_difference(states, goal)) for states, goal in zip(block.outputs(), goals, strict=True)) / len(goals)
