"""The experts of a layer as packed linear layers, where transformers packs their weights into two tensors of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_plus.model import FUSED

from .linear import QuantLinear

Leaves = tuple[str, str, str]  # what a checkpoint calls gate, up and down: gate_proj, up_proj, down_proj


def leaves_of(names: Sequence[str]) -> Leaves | None:
    """Which of three names are gate, up and down; None for other names."""
    for gate, up in (siblings for siblings in FUSED if len(siblings) == 2):
        if {gate, up} < set(names) and len(set(names)) == 3:
            return gate, up, next(name for name in names if name not in (gate, up))
    return None


def may_be_packed(own: nn.Module) -> bool:
    """Whether a module of transformers is experts that multiply by `gate_up_proj`, gate above up, then by `down_proj`, and do no more."""
    plain = getattr(own, "has_gate", False) and getattr(own, "is_concatenated", False) and hasattr(own, "_apply_gate")
    more = any(getattr(own, name, True) for name in ("is_transposed", "has_bias", "has_post_expert_norm"))
    return plain and not more and {name for name, _ in own.named_parameters()} == {"gate_up_proj", "down_proj"} and not any(own.buffers())


class QuantExperts(nn.Module):
    """Experts of a mixture, each of three packed layers, under the names that the checkpoint has for them.

    own: the module in whose place they stand, which knows how gate and up become one. experts: the layers of each, by the names in `leaves`.
    """

    def __init__(self, own: nn.Module, experts: Sequence[Mapping[str, QuantLinear]], leaves: Leaves) -> None:
        super().__init__()
        own._parameters.clear()
        self.own: Any = own
        self.leaves = leaves
        for number, layers in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, width]. top_k_index, top_k_weights: [tokens, k], the experts of each token and what their outputs count."""
        total = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            layers = self._modules[str(number)]
            assert isinstance(layers, nn.ModuleDict)
            gate, up, down = (layers[leaf] for leaf in self.leaves)
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            y = down(self.own._apply_gate(torch.cat((gate(x), up(x)), -1)))
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total
