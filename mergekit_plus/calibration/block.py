"""One block of a model while a text stands before it: its module, its linear weights, the moments of what reaches them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..moments import Moments
from .products import Bfloat16Products
from .skeleton import Call
from .states import HiddenStates

PANEL = 256  # rows of a Gram matrix that are summed at once; one that is symmetric needs half of its entries

# The functions by which modules apply a matrix: which argument is the input, and which the matrix.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    functional.linear: (0, 1), torch.addmm: (1, 2), torch.matmul: (0, 1), Tensor.matmul: (0, 1), Tensor.__matmul__: (0, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One decoder (or encoder) block while the text stands before it.

    `module` has the checkpoint's weights in float32 until they are changed. `weights` are its linear weights [out, in] by the checkpoint's names:
    views of the module's parameters (a Conv1D's turned, an expert's a slice), so that writing into one changes the module.
    """

    index: int
    name: str  # "model.layers.3"
    names: tuple[str, ...]  # of its tensors in the checkpoint
    module: nn.Module
    weights: Mapping[str, Tensor]
    inputs: HiddenStates
    calls: Sequence[Sequence[Call]]  # of each batch, of each block
    device: str = "cpu"
    dense_inputs: HiddenStates | None = None  # the hidden states in the model that nothing was done to
    dense: nn.Module | None = field(default=None, repr=False)  # this block as it was
    dense_weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    bfloat16: bool = False  # forward passes multiply in it

    def forward(self, number: int, states: Tensor) -> Tensor:
        """The output of the module as it is now for a batch of hidden states, the `number`-th of the text."""
        with Bfloat16Products() if self.bfloat16 else nullcontext():
            return self.calls[number][self.index](self.module, states.to(self.device))

    def outputs(self) -> Iterator[Tensor]:
        """What the module as it is now makes of its inputs, batch by batch."""
        for number, states in enumerate(self.inputs):
            with torch.no_grad():  # not around the yield: whoever takes the states keeps gradients as they were
                output = self.forward(number, states)
            yield output

    def forward_dense(self, number: int) -> Tensor:
        """What this block as it was makes of a batch of hidden states of the model that nothing was done to; in a walk with `cross`."""
        if self.dense is None or self.dense_inputs is None:
            raise ValueError("the walk must be given cross=True")
        with Bfloat16Products() if self.bfloat16 else nullcontext():
            return self.calls[number][self.index](self.dense, self.dense_inputs[number].to(self.device))

    def dense_outputs(self) -> Iterator[Tensor]:
        """As `outputs`, of the block as it was, in the model that nothing was done to."""
        for number in range(len(self.inputs)):
            with torch.no_grad():
                output = self.forward_dense(number)
            yield output

    def moments(self, names: Collection[str] | None = None, cross: bool = False) -> dict[str, Moments]:
        """The moments of what reaches these linear weights (all by default): one pass of the inputs through the module as it is now.

        They come in the order in which the weights are applied; weights that are applied to one input share its moments, and their memory. With
        `cross`, the same tokens flow through the block as it was, from the hidden states of the model that nothing was done to.
        """
        wanted = {name: weight for name, weight in self.weights.items() if names is None or name in names}
        sums = _Sums(wanted, self.dense_weights if cross else None)
        with torch.no_grad():
            for number, states in enumerate(self.inputs):
                if cross:
                    with sums.watch_dense():
                        self.forward_dense(number)
                with sums:
                    self.forward(number, states)
        return sums.moments()


def with_dense(module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a block, and the views of its linear weights."""
    copy = deepcopy(module)
    starts = [(old.data_ptr(), old.numel() * old.element_size(), new) for old, new in zip(module.parameters(), copy.parameters(), strict=True)]
    views = {}
    for name, weight in weights.items():
        start, _, new = next(entry for entry in starts if entry[0] <= weight.data_ptr() < entry[0] + entry[1])
        views[name] = torch.as_strided(new.data, weight.shape, weight.stride(), (weight.data_ptr() - start) // new.element_size())
    return copy, views


class _Places:
    """Which weights a matrix holds, by where it lies in memory: modules apply what transformers packs by other names than those of the checkpoint."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        placed = sorted((weight.data_ptr(), name) for name, weight in weights.items())
        self.starts, self.names = [start for start, _ in placed], [name for _, name in placed]

    def applied(self, func: Any, args: Sequence[Any]) -> list[str]:
        """The weights that a call applies to its input, none for any other call."""
        if func not in _PRODUCTS or len(args) <= _PRODUCTS[func][1]:
            return []
        matrix = args[_PRODUCTS[func][1]]
        if not isinstance(matrix, Tensor) or matrix.dim() != 2:
            return []
        start = matrix.data_ptr()
        return self.names[bisect_left(self.starts, start) : bisect_left(self.starts, start + matrix.numel() * matrix.element_size())]


@dataclass
class _Sum:
    """The sums over one input of one or several weights."""

    gram: Tensor
    total: Tensor
    cross: Tensor | None
    tokens: int = 0


class _Sums(TorchFunctionMode):
    """Sees every product of a forward pass and sums over the inputs of those weights that are wanted."""

    def __init__(self, weights: Mapping[str, Tensor], dense: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.weights = weights
        self.places = _Places(weights)
        self.sums: dict[str, _Sum] = {}
        self.last: tuple[Tensor, _Sum] | None = None
        self.dense = _Kept(_Places(dense)) if dense is not None else None

    def watch_dense(self) -> _Kept:
        """Keeps the inputs of the same weights in the block as it was."""
        assert self.dense is not None
        self.dense.inputs.clear()
        return self.dense

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if names := self.places.applied(func, args):
            self._add(names, args[_PRODUCTS[func][0]])
        return func(*args, **(kwargs or {}))

    def _add(self, names: Sequence[str], inputs: Tensor) -> None:
        name = names[0]
        if self.last is not None and self.last[0] is inputs:  # q, k and v; gate and up
            shared = self.last[1]
            self.sums.update({name: shared for name in names if name not in self.sums})
            if self.sums[name] is shared:
                return
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        if name not in self.sums:
            zeros = x.new_zeros(x.shape[1], x.shape[1])
            fresh = _Sum(zeros, x.new_zeros(x.shape[1], dtype=torch.float64), torch.zeros_like(zeros) if self.dense is not None else None)
            self.sums.update(dict.fromkeys(names, fresh))
        found = self.sums[name]
        for first in range(0, x.shape[1], PANEL):  # of rows, from the diagonal on
            found.gram[first : first + PANEL, first:].addmm_(x[:, first : first + PANEL].T, x[:, first:])
        found.total += x.sum(0)
        found.tokens += len(x)
        if found.cross is not None and self.dense is not None:
            before = self.dense.inputs[name]
            found.cross.addmm_(before.reshape(x.shape).T, x)
        self.last = inputs, found

    def moments(self) -> dict[str, Moments]:
        """The means, in the order in which the weights were applied; zeros for what nothing reached."""
        self.last = None
        done: dict[int, Moments] = {}
        found: dict[str, Moments] = {}
        for name in dict.fromkeys((*self.sums, *self.weights)):
            entry = self.sums.get(name)
            if entry is None:
                found[name] = Moments.unseen(self.weights[name])
                continue
            if id(entry) not in done:
                cross = None if entry.cross is None else entry.cross.div_(entry.tokens)
                _mirror(entry.gram.div_(entry.tokens))
                done[id(entry)] = Moments(entry.gram, (entry.total / entry.tokens).float(), entry.tokens, cross)
            found[name] = done[id(entry)]
        return found


def _mirror(gram: Tensor) -> None:
    """What is right of the panels on the diagonal is copied to below them."""
    for first in range(0, len(gram), PANEL):
        last = first + PANEL
        gram[last:, first:last] = gram[first:last, last:].T


class _Kept(TorchFunctionMode):
    """Keeps the inputs of weights for the length of one batch."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places
        self.inputs: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name in self.places.applied(func, args):
            self.inputs[name] = args[_PRODUCTS[func][0]].detach()
        return func(*args, **(kwargs or {}))
