"""An adapter of neurons: some more of them in the MLP of every block, beside those that are there.

This is the parallel adapter of AdaptFormer (arXiv 2205.13535) and of He et al. (arXiv 2110.04366), `mlp(x) + U f(D x)`, with the MLP's own f (gate and all) in
place of ReLU. With another f no weights of the model could hold it; with its own the sum is one MLP: D is more rows of the layers that make neurons, U more
columns of the one that reads them, and base and adapter are an ordinary model whose MLPs are wider, exactly.

adapter_config.json has the type NEURONS, which peft does not know; the tensors have the names of the base's, after peft's prefix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.folder import ADAPTER_CONFIG
from ..errors import CheckpointError
from ..model import NEURON_COUNTS, NEURONS, adapter_reason, describe, meta_model, quantized_reason
from .peft import NEURONS_TYPE, PREFIX, refuse_misfits


@dataclass(frozen=True)
class Mlp:
    """The neurons of a block: the weights that make them, by their rows, and the one that reads them, by its columns."""

    makers: tuple[str, ...]
    reader: str

    def specs(self, base: Checkpoint, count: int, dtype: str) -> list[TensorSpec]:
        """The tensors of so many more."""
        makers = [TensorSpec(PREFIX + name, dtype, (count, base.specs[name].shape[1])) for name in self.makers]
        return [*makers, TensorSpec(PREFIX + self.reader, dtype, (base.specs[self.reader].rows, count))]


def mlps(base: Checkpoint) -> list[Mlp]:
    """The neurons of every block. Errors: CheckpointError for a model whose MLPs are not known to have neurons that more can be put beside."""
    if reason := quantized_reason(base) or adapter_reason(base):
        raise CheckpointError(reason)
    roles = describe(base)
    found = []
    for names in roles.blocks.values():
        linears = {name.split(".")[-2]: name for name in names if roles.tensors[name].role == "linear" and ".experts." not in name}
        known = next(((makers, reader) for makers, reader in NEURONS if {*makers, reader} <= linears.keys()), None)
        mlp = None if known is None else Mlp(tuple(linears[leaf] for leaf in known[0]), linears[known[1]])
        if mlp is None or any(roles.tensors[name].transposed or roles.tensors[name].parameter != name for name in (*mlp.makers, mlp.reader)):
            lacking = " or ".join(" + ".join((*makers, reader)) for makers, reader in NEURONS)
            raise CheckpointError(f"{base.label}: {names[0].rpartition('.')[0]} stands in a block whose MLP is not {lacking}; train a LoRA")
        found.append(mlp)
    if not found or not any(key in base.config for key in NEURON_COUNTS):
        raise CheckpointError(f"{base.label}: config.json says of no blocks with MLPs how wide these are; train a LoRA")
    return found


def neurons_of(label: str, steps: Sequence[Step], base: str | None) -> Checkpoint:
    """The adapter that these steps write."""
    config = {"peft_type": NEURONS_TYPE, "base_model_name_or_path": base, "inference_mode": True}
    return Checkpoint(label, Plan(steps), {ADAPTER_CONFIG: json.dumps(config, indent=2).encode() + b"\n"})


def is_neurons(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter of neurons."""
    return ADAPTER_CONFIG in checkpoint.files and checkpoint.json_file(ADAPTER_CONFIG).get("peft_type") == NEURONS_TYPE


def widened(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """The base with the neurons of an adapter after its own, which are as they were; rounded once, to the base's dtype.

    Errors: CheckpointError where they do not fit, or where transformers does not build the architecture wider.
    """
    places = {name: int(name == mlp.reader) for mlp in mlps(base) for name in (*mlp.makers, mlp.reader)}  # along which they are put
    own = {name.removeprefix(PREFIX): spec for name, spec in adapter.specs.items()}
    problems = [f"the base has no '{name}' that makes neurons or reads them" for name in own if name not in places]
    problems += [f"it holds no {name}" for name in places if name not in own]
    fitting = {name: spec for name, spec in own.items() if name in places and len(spec.shape) == 2}
    counts = {spec.shape[places[name]] for name, spec in fitting.items()}
    other = [name for name, spec in fitting.items() if spec.shape[1 - places[name]] != base.specs[name].shape[1 - places[name]]]
    problems += [f"{name} is {own[name].shape} in the adapter and {base.specs[name].shape} in the base" for name in other]
    problems += [] if len(counts) == 1 else ["its blocks have unlike numbers of neurons"]
    refuse_misfits(f"{adapter.label} does not fit {base.label}", problems, "Give the base that it was trained on")
    count = counts.pop()
    biases = {bias for name in places if not places[name] and (bias := f"{name.removesuffix('weight')}bias") in base.specs}
    steps = [
        _side_by_side(base, adapter, name, places[name], count) if name in places
        else _with_zeros(base, name, count) if name in biases else copy_step(base, name)
        for name in base.specs
    ]  # fmt: skip
    result = Checkpoint(f"{base.label}+{adapter.label}", Plan(steps), base.files, (*base.notes, *adapter.notes))
    result = result.with_config(**{key: base.config[key] + count for key in NEURON_COUNTS if key in base.config})
    built = meta_model(result).state_dict()
    if wrong := [name for name in (*places, *biases) if tuple(built[name].shape) != result.specs[name].shape]:
        raise CheckpointError(f"{base.label}: its architecture cannot be built wider: {wrong[0]} would be {tuple(built[wrong[0]].shape)}")
    return result


def _side_by_side(base: Checkpoint, adapter: Checkpoint, name: str, axis: int, count: int) -> Step:
    spec = base.specs[name]
    shape = tuple(length + count * (place == axis) for place, length in enumerate(spec.shape))

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (torch.cat([tensors[0], tensors[1].to(TORCH_DTYPES[spec.dtype])], axis),)

    return Step(((base, name), (adapter, PREFIX + name)), (replace(spec, shape=shape),), run)


def _with_zeros(base: Checkpoint, name: str, count: int) -> Step:
    """The bias of a layer that makes neurons: the new ones have none."""
    spec = base.specs[name]

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (torch.cat([tensors[0], tensors[0].new_zeros(count)]),)

    return Step(((base, name),), (replace(spec, shape=(spec.rows + count,)),), run)
