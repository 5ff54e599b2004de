"""The loss of many folds of one model on one text; those that begin alike run together as long as they are.

What each block of the original becomes (nothing, itself, itself with the linear weights of others) makes a path through the blocks, and the paths a tree: a
block runs once for all folds that came to it the same way. All 793 ways to take one to four of twelve blocks out need 1,584 runs of a block, not 6,732.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_plus.calibration.skeleton import Call
from mergekit_plus.errors import OptionError
from mergekit_plus.progress import Progress, quiet
from mergekit_plus.training import next_token

from .blocks import Blocks
from .surgery import Fold

BATCH = 8  # windows that flow together; of them the hidden states before every block are in memory

Path = tuple[tuple[int, ...] | None, ...]  # of each block the blocks whose mean its linear weights are; None for one that is not there


def losses(blocks: Blocks, folds: Sequence[Fold], rows: Tensor, progress: Progress | None = None) -> list[float]:
    """The loss of the next token, in nats, of the model after each of these surgeries; rows: int64 [windows, window].

    Weights are shared in float32, as the model is in memory. Errors: OptionError for a fold that the model does not have the blocks for, and for one that
    puts them in another order.
    """
    paths = [path_of(fold, len(blocks)) for fold in folds]
    totals, progress = [0.0] * len(folds), progress or quiet()
    with progress.phase("measuring", len(folds) * len(rows), " windows"), torch.inference_mode():
        for part in torch.split(rows, BATCH):
            run = _Run(blocks, part)

            def descend(depth: int, states: Tensor, wanted: Sequence[int], run: _Run = run) -> None:
                if depth == len(blocks):
                    loss = run.loss(states)
                    for number in wanted:
                        totals[number] += loss * len(run.rows)
                    progress.advance(len(wanted) * len(run.rows))
                    return
                for sources in dict.fromkeys(paths[number][depth] for number in wanted):
                    alike = [number for number in wanted if paths[number][depth] == sources]
                    descend(depth + 1, states if sources is None else run.block(depth, sources, states), alike)

            descend(0, run.first, range(len(folds)))
    return [total / len(rows) for total in totals]


def path_of(fold: Fold, blocks: int) -> Path:
    """What becomes of each block of the original. Errors: OptionError."""
    if problems := list(fold.problems(blocks)):
        raise OptionError("; ".join(problems))
    if list(fold.kept) != sorted(set(fold.kept)):
        raise OptionError(f"the blocks {list(fold.kept)} are not in the order of the model; what is measured keeps it")
    places = {block: place for place, block in enumerate(fold.kept)}
    return tuple(fold.sources(places[block]) if block in places else None for block in range(blocks))


class _Run:
    """One batch of a text: what the blocks are called with, and the model around them."""

    def __init__(self, blocks: Blocks, rows: Tensor) -> None:
        self.blocks, self.rows = blocks, rows
        self.calls: list[Call] = []
        entering: list[Tensor] = []
        self.wrapped = False

        def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.wrapped = not isinstance(output, Tensor)
            states, call = Call.of(args, kwargs)
            entering.append(states)
            self.calls.append(call)

        handles = [module.register_forward_hook(see, with_kwargs=True) for module in blocks.modules]
        try:
            blocks.model(input_ids=rows, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.first = entering[0]

    def block(self, number: int, sources: Sequence[int], states: Tensor) -> Tensor:
        """What a block makes of hidden states when its linear weights are the mean of those of `sources`."""
        module = self.blocks.modules[number]
        if tuple(sources) == (number,):
            return self.calls[number](module, states)
        first, *others = (self.blocks.shared_of(source) for source in sources)
        weights = {name: sum((table[name] for table in others), weight) / len(sources) for name, weight in first.items()}
        return self.calls[number](With(module, weights), states)

    def loss(self, states: Tensor) -> float:
        """The loss when these are the hidden states after the last block."""
        with self._handing_out((states,) if self.wrapped else states):
            return next_token(self.blocks.model, self.rows).item()

    @contextmanager
    def _handing_out(self, output: Any) -> Iterator[None]:
        for module in self.blocks.modules:
            module.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for module in self.blocks.modules:
                del module.forward


class With(nn.Module):
    """A module with other values of some parameters, by their names in it."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = module, dict(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.weights, args, kwargs)
