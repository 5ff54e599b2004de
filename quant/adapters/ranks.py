"""Which modules get rank, under a budget of parameters: by how much the loss falls, to first order, for each weight that may move.

The sensitivity of a weight is the sum of its squared gradients over some batches of the text (SPT, sensitivity-aware visual parameter-efficient fine-tuning,
arXiv 2303.08566). There the most sensitive weights of the whole model are chosen, and a matrix with many of them gets a LoRA of a fixed rank; here a rank k of
[out, in], which has k (out + in) parameters, counts as that many of the matrix's most sensitive weights, and integer programming chooses ranks that count most
within the budget: the same choice of weights, but for whole ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.errors import OptionError
from mergekit_plus.progress import Progress, quiet
from mergekit_plus.training import next_token

from ..allocate import solve

BATCHES, BATCH = 16, 4


def sensitivities(model: Any, modules: Mapping[str, bool], ids: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
    """The sum of squared gradients of modules' weights, float32 [out, in], over up to 16 batches of 4 windows, spread evenly over int64 ids [windows, window].

    modules: by name, whether the weight is stored as its transpose. Memory: the weights' size in float32, beside the model and its activations.
    """
    progress = progress or quiet()
    weights = {name: model.get_submodule(name).weight for name in modules}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def add(name: str) -> Any:
        def hook(weight: Any) -> None:
            sums[name].addcmul_(weight.grad, weight.grad)
            weight.grad = None

        return hook

    handles = [weight.register_post_accumulate_grad_hook(add(name)) for name, weight in weights.items()]
    count = min(len(ids), BATCHES * BATCH)
    batches = torch.split(ids[torch.arange(count) * len(ids) // count], BATCH)
    trained = {id(weight) for weight in weights.values()}
    try:
        for parameter in required:
            parameter.requires_grad_(id(parameter) in trained)
        with torch.enable_grad(), progress.phase("sensitivities", len(batches), " batches"):
            for batch in batches:
                next_token(model, batch).backward()  # type: ignore[no-untyped-call]
                progress.advance(1)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)
    return {name: total.T if modules[name] else total for name, total in sums.items()}


def ranks_within(sensitivity: Mapping[str, Tensor], budget: int, most: int) -> dict[str, int]:
    """The rank of each module, 0 to `most`, so that the sensitivities that they count for add up to most within a budget of parameters.

    Errors: OptionError for a budget in which no module gets a rank.
    """
    costs, losses = [], []
    for own in sensitivity.values():
        each = sum(own.shape)
        top = min(most, *own.shape)
        sums = own.flatten().sort(descending=True).values[: top * each].double().cumsum(0)
        counted = [0.0, *(float(sums[min(rank * each, len(sums)) - 1]) for rank in range(1, top + 1))]
        losses.append([-value for value in counted])
        costs.append([rank * each for rank in range(top + 1)])
    least = min(own[1] for own in costs)
    if budget < least:
        raise OptionError(f"a budget of {budget} parameters gives no module a rank: rank 1 of the smallest has {least}")
    return dict(zip(sensitivity, solve(losses, costs, budget).choices, strict=True))
