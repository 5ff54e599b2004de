"""How far a model's predictions move when some of its weights change: KL at the logits, with only the blocks behind the change computed again.

The model's own forward runs. While it does, the blocks before the changed one are not computed: each hands out what it gave when the text flowed through
the model at its reference point. So whatever an architecture does around its blocks (masks, rotary tables, the last norm, soft caps) is done as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergekit_plus.errors import CheckpointError
from mergekit_plus.model import layer_of

BATCH = 4096  # tokens in a forward pass


def batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Windows [windows, window] in the portions that flow at a time."""
    return torch.split(rows, max(1, BATCH // rows.shape[1]))


class Replay:
    """A model in memory, a text in windows [windows, window], and what the dense model predicts for it.

    Memory: the model in float32, its log-probabilities for the text, and the outputs of all blocks for it.
    """

    def __init__(self, model: Any, rows: Tensor) -> None:
        self.model, self.batches = model, batches(rows)
        self.parameters: dict[str, Tensor] = model.state_dict()
        with torch.inference_mode():
            self.targets = [self._predict(batch) for batch in self.batches]  # of the model as it is now: dense
        self.outputs: list[dict[int, Any]] = [{} for _ in self.batches]
        self.current = 0  # the batch that flows
        stacks = [place[0] for name in self.parameters if (place := layer_of(name))]
        if not stacks:
            raise CheckpointError(f"{type(model).__name__} has no stack of blocks, so that none can be replayed")
        self.stack = max(dict.fromkeys(stacks), key=stacks.count)
        self.blocks = list(model.get_submodule(self.stack))

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give parameters these values."""
        with torch.no_grad():
            for name, weight in weights.items():
                self.parameters[name].copy_(weight)

    @contextmanager
    def changed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters with these values inside, and as they were afterwards."""
        before = {name: self.parameters[name].clone() for name in weights}
        self.fill(weights)
        try:
            yield
        finally:
            self.fill(before)

    def divergence(self) -> Tensor:
        """KL(dense || the model as it is now) in nats a token, float64 [windows]."""
        return self._divergences(None)

    def record(self) -> Tensor:
        """As `divergence`, and remember the outputs of the blocks: the model is at its reference point."""
        handles = []
        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_hook(lambda _, __, output, number=number: self._record(number, output)))
        try:
            return self._divergences(None)
        finally:
            for handle in handles:
                handle.remove()

    def divergence_after(self, names: Iterable[str]) -> Tensor:
        """As `divergence`, where only these parameters are not as they were at `record`."""
        places = [layer_of(name) for name in names]
        return self._divergences(min((place[1] if place and place[0] == self.stack else 0) for place in places))

    def _record(self, number: int, output: Any) -> None:
        self.outputs[self.current][number] = output

    def _divergences(self, first: int | None) -> Tensor:
        found = []
        with torch.inference_mode():
            for number, (batch, target) in enumerate(zip(self.batches, self.targets, strict=True)):
                self.current = number
                with self._skipping(first):
                    here = self._predict(batch)
                kl = functional.kl_div(here, target, log_target=True, reduction="none").sum(-1)  # [windows, window - 1]
                found.append(kl.double().mean(-1).cpu())
        return torch.cat(found)

    @contextmanager
    def _skipping(self, first: int | None) -> Iterator[None]:
        """The blocks before this one hand out what was recorded."""
        skipped = self.blocks[: first or 0]
        for number, block in enumerate(skipped):
            block.forward = lambda *_, output=self.outputs[self.current][number], **__: output
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def _predict(self, batch: Tensor) -> Tensor:
        """Log-probabilities after each token but the last, float32 [windows, window - 1, vocabulary]."""
        logits: Tensor = self.model(input_ids=batch.to(self.model.device), use_cache=False).logits
        return logits[:, :-1].float().log_softmax(-1)
