"""Slices of layers, one on the other: which tensor of which model becomes which of the output, and what config.json says then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..layers import Part, along, layer_entries
from ..model import tied_alias
from .schema import Reference, Slice


class Stack:
    """The slices of one part of the output. What stands before the layers comes from the sources of the first slice, what stands after from the last's."""

    def __init__(self, slices: Sequence[Slice], parts: Mapping[Reference, Part], models: Mapping[Reference, Checkpoint]) -> None:
        self.slices, self.parts, self.models = slices, parts, models
        self.taken: list[tuple[Part, int]] = []  # for each layer of the output the layer of the first source, whose config speaks for it
        self.starts: list[int] = []
        for part in slices:
            self.starts.append(len(self.taken))
            for source in part.sources:
                if source.layer_range[1] > (count := len(parts[source.model].layers)):
                    raise CheckpointError(f"layer_range {list(source.layer_range)}: {source.model} has {count} layers")
            self.taken += [(parts[part.sources[0].model], layer) for layer in range(*part.sources[0].layer_range)]

    def names(self, number: int) -> list[dict[str, str]]:
        """For each source of a slice the names of its tensors, by their names in the output."""
        sources = self.slices[number].sources
        loose: dict[str, None] = {}
        if number == 0:
            loose |= dict.fromkeys(name for source in sources for name in self.parts[source.model].before)
        if number == len(self.slices) - 1:  # also a head that only other models store: a tied one is written beside the embeddings of another
            loose |= dict.fromkeys(name for part in self.parts.values() for name in part.after)
        found = []
        for source in sources:
            part, model = self.parts[source.model], self.models[source.model]
            places = {name: name if name in model.specs else tied_alias(model, name) for name in loose}
            names = {name: place for name, place in places.items() if place}
            for offset, layer in enumerate(range(*source.layer_range)):
                names |= {part.moved(name, layer, self.starts[number] + offset): name for name in part.layers[layer]}
            found.append(names)
        return found

    def places(self, number: int) -> dict[str, float]:
        """How far along the slice the layer of each tensor is, 0 to 1, for those that are in one."""
        found: dict[str, float] = {}
        for source in self.slices[number].sources:
            part, layers = self.parts[source.model], range(*source.layer_range)
            for offset, layer in enumerate(layers):
                place = along(offset, len(layers))
                found |= {part.moved(name, layer, self.starts[number] + offset): place for name in part.layers[layer]}
        return found

    def config(self, part: Part, donor: Checkpoint) -> dict[str, Any]:
        """What the part's table of config.json says of the layers: how many there are, and the lists that go by layers."""
        if donor.config and len(self.taken) != len(part.layers) and not part.counts:
            raise CheckpointError(f"{donor.label}: config.json does not speak of {len(part.layers)} layers, so it cannot say that there are {len(self.taken)}")
        for other, _ in self.taken:
            if lacking := [key for key in part.per_layer if key not in other.per_layer]:
                raise CheckpointError(f"{donor.label}: config.json has an entry for every layer in {lacking[0]}, that of another model in the slices has none")
        return layer_entries(part, self.taken)
