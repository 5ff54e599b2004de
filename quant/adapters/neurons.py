"""Neurons that train beside those of every MLP: AdaptFormer's parallel adapter, with the MLP's own activation; at few bits packed, as LoRA factors are.

What is coded are the rows of the layers that make neurons and the columns of the one that reads them, so that a scale belongs to a neuron. While they train,
what makes neurons puts out the new ones after the old, and what reads them adds what it makes of these: whatever stands between is that of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.adapters.neurons import Mlp, mlps, neurons_of
from mergekit_plus.checkpoint import Checkpoint, Work
from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import next_token

from .codebooks import Codebook
from .coding import Coding, Scale, straight_through
from .latent import small
from .scratch import PLAIN, written
from .train import Lesson


@dataclass(frozen=True)
class NeuronOptions:
    """What is trained: so many neurons in every MLP, at these bits; 16 for plain ones, in float16."""

    count: int = 16
    bits: int = 1
    codebook: Codebook = "l2"
    scale: Scale = "component"

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        found = [] if self.count > 0 else [f"neurons must be 1 or more, not {self.count}"]
        try:
            _ = self.coding
        except OptionError as error:
            found.append(f"{error}; 16 trains plain neurons")
        return found

    @property
    def coding(self) -> Coding | None:
        """How they are coded, None where they are not. Errors: OptionError."""
        return None if self.bits == PLAIN else Coding(self.bits, self.codebook, self.scale)


class Neurons(nn.Module):
    """The neurons of one MLP: rows [count, in] of each layer that makes them, and, by its columns, [count, out] of the one that reads them."""

    def __init__(self, makers: Sequence[Tensor], reader: Tensor, coding: Coding | None) -> None:
        super().__init__()
        self.latents, self.coding = nn.ParameterList([*makers, reader]), coding
        self.waiting = reader  # what the model has put out for them, until they are read

    def rows(self, place: int) -> Tensor:
        """Those of a layer, as they are written."""
        rows: Tensor = self.latents[place]
        return rows if self.coding is None else straight_through(rows, self.coding)


@contextmanager
def attached(model: Any, neurons: Mapping[Mlp, Neurons]) -> Iterator[dict[str, nn.Parameter]]:
    """The model with more neurons in its MLPs; their parameters, by name. Afterwards it is as it was."""
    handles = []
    try:
        for mlp, own in neurons.items():
            for place, name in enumerate((*mlp.makers, mlp.reader)):
                layer = model.get_submodule(name.removesuffix(".weight"))
                if name == mlp.reader:
                    handles += [layer.register_forward_pre_hook(_split(own, place)), layer.register_forward_hook(_read(own, place))]
                else:
                    handles.append(layer.register_forward_hook(_make(own, place)))
        yield {f"{mlp.reader}.{leaf}": parameter for mlp, own in neurons.items() for leaf, parameter in own.named_parameters()}
    finally:
        for handle in handles:
            handle.remove()


def _make(own: Neurons, place: int) -> Any:
    return lambda layer, inputs, output: torch.cat([output, functional.linear(inputs[0], own.rows(place))], -1)


def _split(own: Neurons, place: int) -> Any:
    """The layer sees its own neurons; the others wait for it."""

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count = len(own.latents[place])
        own.waiting = inputs[0][..., -count:]
        return (inputs[0][..., :-count],)

    return hook


def _read(own: Neurons, place: int) -> Any:
    return lambda layer, inputs, output: output + functional.linear(own.waiting, own.rows(place).T)


def train_neurons(base: Checkpoint, lesson: Lesson, options: NeuronOptions) -> Checkpoint:
    """An adapter of neurons for the base, trained on the text: at few bits packed, at 16 bits in float16.

    Errors: OptionError for impossible options; CheckpointError where the base has no MLPs that are known to have neurons.
    """
    if found := options.problems() + lesson.problems():
        raise OptionError("; ".join(found))
    places, coding = mlps(base), options.coding
    dtype = "F16" if coding is None else "F32"
    tensors = [(spec, int(spec.name.endswith(mlp.reader))) for mlp in places for spec in mlp.specs(base, options.count, dtype)]

    def train(work: Work) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(lesson.training.seed)
        neurons = {mlp: _fresh(base, mlp, options.count, coding, generator) for mlp in places}
        model = load_model(base, progress=work.progress)
        with attached(model, neurons) as parameters:
            lesson.teach(model, parameters, next_token, work)
        return [rows.detach() for own in neurons.values() for rows in own.latents]

    label = f"neurons of {base.label}"
    steps, files = written(label, [base], tensors, coding, train)
    adapter = neurons_of(label, steps, base.ref)
    return replace(adapter, files={**adapter.files, **files})


def _fresh(base: Checkpoint, mlp: Mlp, count: int, coding: Coding | None, generator: torch.Generator) -> Neurons:
    """What makes neurons as a linear layer begins, what reads them at zero, or nearly."""
    widths = [base.specs[name].shape[1] for name in mlp.makers]
    makers = [torch.empty(count, width).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator) for width in widths]
    return Neurons(makers, small((count, base.specs[mlp.reader].rows), coding, generator), coding)
