"""Coordinate descent: what a quantiser decided is gone through again, one scale or column at a time, each put where the output's error is least.

With E = W - Q and P = E H, and all else left as it is, the error tr(E H E^T) is a parabola in

    the scale of a group with steps c, codes less the zero point: least at s + (c . P) / (c H c^T), over the columns of the group;
    column j: least at q_j + P_j / H_jj, so that of all codes the nearest to that is the best.

So no move raises the error; scales are compared as they are stored, and rows do not know each other. For columns this is QuantEase (Behdin et al., QuantEase:
Optimization-based Quantization for Language Models, 2023); here the scales move as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .quantized import Quantized, Scheme
from .rtn import storable

LEAF = 32  # columns gone through one by one between matrix products


def descend(target: Tensor, zero: Tensor, start: Quantized, gram: Tensor, scheme: Scheme, sweeps: int) -> Quantized:
    """The quantised weight after all groups and columns were gone through `sweeps` times, in the order of the file.

    target: [out, in], what the quantised weight is to come near to; gram: H [in, in], of positive diagonal. Zero points stay as they are,
    and so do the values of weights that are `zero` [out, in]: pruned ones.
    """
    if not sweeps:
        return start
    return _Descent(target, zero, start, gram, scheme).run(sweeps)


class _Descent:
    """The state between moves, all of it [in, out] or [groups, out]: a column lies in one piece."""

    def __init__(self, target: Tensor, zero: Tensor, start: Quantized, gram: Tensor, scheme: Scheme) -> None:
        self.start, self.gram, self.scheme = start, gram, scheme
        groups = start.scale.shape[1]
        self.size = target.shape[1] // groups
        self.scale = start.scale.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self.origin = torch.zeros_like(self.scale) if start.zero_point is None else start.zero_point.float().T
        self.low, self.high = scheme.low - self.origin, scheme.high - self.origin
        self.steps = start.codes.float().T.contiguous()
        self._grouped(self.steps).sub_(self.origin.unsqueeze(1))
        self.fixed, self.pruned = zero.T.contiguous(), bool(zero.any())
        self.power = gram.diagonal()
        self.pull = gram / self.power  # what an error of column i adds to the wish of column j: H_ij / H_jj
        self.wish = self.pull.T @ (target.float().T - (self._grouped(self.steps) * self.scale.unsqueeze(1)).flatten(0, 1))  # P_j / H_jj
        self.moved = torch.zeros_like(self.wish)  # how much the error of each column has changed in the group, or the part of it, gone through last

    def run(self, sweeps: int) -> Quantized:
        for _ in range(sweeps):
            self._groups(0, len(self.scale))
        codes = self._grouped(self.steps) + self.origin.unsqueeze(1)
        return replace(self.start, codes=codes.flatten(0, 1).T.to(torch.int8).contiguous(), scale=self.scale.T.to(self.start.scale.dtype).contiguous())

    def _grouped(self, columns: Tensor) -> Tensor:
        return columns.view(len(self.scale), self.size, -1)

    def _groups(self, first: int, last: int) -> None:
        """Go through these groups, and tell each of what the others did."""
        if last - first == 1:
            change = self._rescale(first)
            self._columns(first * self.size, last * self.size, first)
            self.moved[first * self.size : last * self.size] += change
            return
        middle = (first + last) // 2
        self._groups(first, middle)
        self._tell(first * self.size, middle * self.size, last * self.size)
        self._groups(middle, last)
        self._tell_back(first * self.size, middle * self.size, last * self.size)

    def _columns(self, first: int, last: int, group: int) -> None:
        """Go through these columns of a group, and tell each of what the others did."""
        if last - first > LEAF:
            middle = (first + last) // 2
            self._columns(first, middle, group)
            self._tell(first, middle, last)
            self._columns(middle, last, group)
            self._tell_back(first, middle, last)
            return
        here, scale, low, high = slice(first, last), self.scale[group], self.low[group], self.high[group]
        steps, moved, pull, before = self.steps[here], self.moved[here], self.pull[here, here], self.steps[here].clone()
        best = torch.div(self.wish[here], scale).add_(steps)  # where each column wants to be, in steps, until it is gone through
        for w, new, old, change, row, fixed in zip(best, steps, before, moved, pull, self.fixed[here], strict=True):
            torch.clamp(w.round_(), low, high, out=new)
            if self.pruned:
                torch.where(fixed, old, new, out=new)
            torch.sub(old, new, out=change)
            best.addr_(row, change)
        moved.mul_(scale)
        self.wish[here].addmm_(pull.T, moved)

    def _tell(self, first: int, middle: int, last: int) -> None:
        self.wish[middle:last].addmm_(self.pull[first:middle, middle:last].T, self.moved[first:middle])

    def _tell_back(self, first: int, middle: int, last: int) -> None:
        self.wish[first:middle].addmm_(self.pull[middle:last, first:middle].T, self.moved[middle:last])

    def _rescale(self, group: int) -> Tensor:
        """Move the scale of a group; by how much the errors of its columns change."""
        here = slice(group * self.size, (group + 1) * self.size)
        steps = self.steps[here]
        slope = (steps * self.wish[here] * self.power[here].unsqueeze(1)).sum(0)
        bend = (steps * (self.gram[here, here] @ steps)).sum(0)
        wanted = self.scale[group] + torch.where(bend > 0, slope / bend, 0.0)
        move = storable(wanted, self.scheme, self.start.scale.dtype) - self.scale[group]
        move = torch.where(move * (move * bend - 2 * slope) < 0, move, 0.0)
        self.scale[group] += move
        change = steps * -move
        self.wish[here].addmm_(self.pull[here, here].T, change)
        return change
