"""Sensitivities that cost a few passes in place of one for each choice of each group: Fisher information at layer outputs, and relative output errors.

"fisher": half the mean square of g . dy, where g is the gradient of the model's log-likelihood at the output of a layer and dy what quantising changes
there: KL(dense || quantised) to second order, if errors at different tokens are independent. Labels are drawn from the model's own predictions, for with the
text's it would not be the Fisher information. "gram": |dy|^2 / |y|^2, that is tr(dW H dW^T) / tr(W H W^T) with the Gram matrix H of the inputs, summed
over the layers of a group; it knows nothing of what a layer's output is good for. Both are taken at the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe
from mergekit_plus.progress import Progress, quiet

from .quantized import Scheme
from .replay import batches
from .sensitivity import Group, Loader, Make, Sensitivities, parameters_of, standard_error

SEED = 0  # of the labels that are drawn


def measure(
    checkpoint: Checkpoint, groups: Sequence[Group], choices: Sequence[Scheme], make: Make, rows: Tensor, *, kind: str,
    reference: Sequence[int] | None = None, device: str = "cpu", progress: Progress | None = None,
) -> Sensitivities:  # fmt: skip
    """As `sensitivity.measure`, at the dense model whatever the reference. Memory: the model in float32, and once more for each choice.

    Errors: CheckpointError for layers that are no `nn.Linear` of the model (experts that transformers packs).
    """
    progress, roles = progress or quiet(), describe(checkpoint)
    where = [parameters_of(roles, group) for group in groups]
    model = load_model(checkpoint).to(device).requires_grad_(False)
    layers = [{name: _layer(model, name) for name in names} for names in where]
    loader = Loader(checkpoint, make, where)
    changes: dict[str, list[Tensor]] = {name: [] for names in where for name in names}
    for choice in choices:
        for name, weight in loader.weights(choice).items():
            changes[name].append(weight.to(device).float() - model.get_parameter(name))
    windows: list[Tensor] = []  # of each batch, [windows, groups, choices]
    draw = torch.Generator(device).manual_seed(SEED)
    with progress.phase(f"sensitivities ({kind})", rows.numel(), " tokens"):
        for batch in batches(rows):
            found = torch.zeros(len(batch), len(groups), len(choices), dtype=torch.float64)
            sums = [torch.zeros(len(choices), *batch.shape, device=device) for _ in groups]
            handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
            for number, own in enumerate(layers):
                for name, layer in own.items():
                    see = partial(_fisher, sums[number], changes[name]) if kind == "fisher" else partial(_gram, found[:, number], changes[name])
                    handles.append(layer.register_forward_hook(see))
            try:
                _run(model, batch.to(device), draw, backward=kind == "fisher")
            finally:
                for handle in handles:
                    handle.remove()
            if kind == "fisher":
                found = torch.stack([part.double().square().mean(-1).T.cpu() / 2 for part in sums], dim=1)
            windows.append(found)
            progress.advance(batch.numel())
    table = torch.cat(windows)  # [windows, groups, choices]
    errors = tuple(tuple(standard_error(table[:, group, choice]) for choice in range(len(choices))) for group in range(len(groups)))
    return Sensitivities(tuple(groups), tuple(choices), tuple(map(tuple, table.mean(0).tolist())), errors, 0.0, None)


def _layer(model: Any, name: str) -> nn.Linear:
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(f"{name} is no linear layer of its own in {type(model).__name__}; measure with --sensitivity kl")
    return layer


def _run(model: Any, batch: Tensor, draw: torch.Generator, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        likely = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)  # [windows, window, vocabulary]
        if backward:
            labels = torch.multinomial(likely.detach().exp().flatten(0, 1), 1, generator=draw)
            likely.flatten(0, 1).gather(1, labels).sum().backward()


def _fisher(sums: Tensor, changes: Sequence[Tensor], layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
    """Add g . dy of this layer [choices, windows, window] once its gradient is known."""
    x = inputs[0].detach()

    def add(gradient: Tensor) -> None:
        for total, change in zip(sums, changes, strict=True):
            total += ((gradient @ change) * x).sum(-1)

    output.register_hook(add)  # type: ignore[no-untyped-call]


def _gram(found: Tensor, changes: Sequence[Tensor], layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
    """Add |dy|^2 / |y|^2 of this layer [windows, choices]."""
    x = inputs[0].detach()
    size = (x @ layer.weight.T).square().sum((-2, -1)).double()
    for number, change in enumerate(changes):
        found[:, number] += ((x @ change.T).square().sum((-2, -1)).double() / size).cpu()
