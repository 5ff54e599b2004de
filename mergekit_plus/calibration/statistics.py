"""Moments of layers' inputs as a checkpoint: measured once on a model, kept in a file, read by any number of runs.

    P.gram [in, in], P.mean [in] float32 and P.tokens [1] int64 for each linear weight P.weight; and `calibration`, JSON as uint8: what was measured,
    on which text, and which layers share another's moments ("shared": q, k and v see the same inputs, so that theirs are stored once).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from ..checkpoint.deferred import Deferred, Work
from ..errors import CheckpointError
from ..model import adapter_reason, describe, quantized_reason
from .block import Block
from .walk import memory, walk

FACTS = "calibration"


def calibrate(checkpoint: Checkpoint, ids: Tensor, text: Mapping[str, Any], device: str = "cpu") -> Checkpoint:
    """The moments of all linear layers of the blocks of a model, as it is, on a text: int64 ids [windows, window]. Nothing is computed yet.

    text: what to say of the text beside the moments. Errors: CheckpointError for a model without linear layers in blocks, or packed, and for an adapter.
    """
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    roles = describe(checkpoint)
    names = [name for block in roles.blocks.values() for name in block if roles.tensors[name].role == "linear" and roles.tensors[name].parameter is not None]
    if not names:
        raise CheckpointError(f"{checkpoint.label} has no linear layer in a block; there is nothing to measure")
    alike = [group for group in roles.fused if not any(".experts." in name for name in group)]
    measured = set(names)
    shared = {_module(name): _module(group[0]) for group in alike for name in group[1:] if name in measured}
    facts = {"model": model_digest(checkpoint), "text": dict(text), "windows": len(ids), "window": ids.shape[1], "shared": shared}
    raw = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    specs = []
    for name in names:
        if _module(name) not in shared:
            shape = checkpoint.specs[name].shape
            width = shape[0] if roles.tensors[name].transposed else shape[1]
            module = _module(name)
            specs += [TensorSpec(f"{module}.gram", "F32", (width, width)), TensorSpec(f"{module}.mean", "F32", (width,))]
            specs.append(TensorSpec(f"{module}.tokens", "I64", (1,)))

    def compute(work: Work) -> None:
        walk(checkpoint, ids, measure, work, device=device)

    def measure(block: Block) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        moments = block.moments()
        for name in block.names:
            owner = shared.get(_module(name))
            if name not in measured:
                continue
            if name not in moments:
                raise CheckpointError(f"{checkpoint.label}: the inputs of {name} cannot be seen")
            own = moments[name]
            if owner is not None:
                if moments[f"{owner}.weight"] is not own:
                    raise CheckpointError(f"{checkpoint.label}: {name} and {owner}.weight are fused by servers, but have different inputs")
                continue
            module = _module(name)
            found |= {f"{module}.gram": own.gram.cpu(), f"{module}.mean": own.mean.cpu(), f"{module}.tokens": torch.tensor([own.tokens])}
        return found

    made = Checkpoint(f"moments of {checkpoint.label}", Deferred(specs, [checkpoint], compute, memory=memory(checkpoint, roles)))
    fact = Step((), (TensorSpec(FACTS, "U8", (len(raw),)),), lambda tensors, first_row, measured: (raw,))
    return Checkpoint(made.label, Plan([fact, *(copy_step(made, name) for name in made.specs)]))


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of what moments must agree on with the model that they are used for: its architecture and the shapes of its tensors."""
    config = {key: value for key, value in checkpoint.config.items() if not key.startswith("_") and key != "transformers_version"}
    shapes = {name: spec.shape for name, spec in sorted(checkpoint.specs.items())}
    return hashlib.sha256(json.dumps([config, shapes], sort_keys=True).encode()).hexdigest()


def _module(name: str) -> str:
    return name.removesuffix(".weight")


class MomentsFile:
    """Moments that were measured before, by the names of weights. Errors: CheckpointError for a file that holds none."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if FACTS not in checkpoint.specs:
            raise CheckpointError(f"{checkpoint.label} holds no moments; `compress calibrate MODEL --text FILE -o {checkpoint.label}` measures them")
        self.checkpoint = checkpoint
        self.facts: dict[str, Any] = json.loads(bytes(checkpoint.read(FACTS).tolist()))

    def check(self, model: Checkpoint) -> None:
        """CheckpointError where the moments were measured on a model of another shape."""
        if self.facts["model"] != model_digest(model):
            other = f"{self.checkpoint.label} was measured on a model of other shapes than {model.label}"
            raise CheckpointError(f"{other}; measure this one with `compress calibrate`")

    def _owner(self, name: str) -> str:
        module = _module(name)
        return str(self.facts["shared"].get(module, module))

    def __contains__(self, name: str) -> bool:
        return f"{self._owner(name)}.gram" in self.checkpoint.specs

    def reads(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """The gram, mean and tokens of a weight's inputs, as a step reads them."""
        return tuple((self.checkpoint, f"{self._owner(name)}.{part}") for part in ("gram", "mean", "tokens"))
