"""What each width of each group of layers costs in quality: KL at the logits, one group switched at a time.

    measure(checkpoint, groups, choices, make, ids) -> Sensitivities

The rest of the model stands at a reference point near where the allocation will be, because what a group at 3 bits does to a model at 16 says little of what
it does to one at 4. A loss is the difference to the reference point's own KL, so those of wider choices are below zero, and the reference point plus
the losses of an allocation predict its KL. The windows of the text make two halves, which tell how much of a loss is noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import ModelMap, describe
from mergekit_plus.progress import Progress, quiet

from .quantized import Scheme
from .replay import Replay

Group = tuple[str, ...]  # weights that share a scheme, by their names in the checkpoint
Make = Callable[[Any], Checkpoint]  # the model with all its groups in one scheme, or to one sparsity: a choice; dense
FORMAT = 1


@dataclass(frozen=True)
class Sensitivities:
    """The losses of groups [groups, choices], relative to a reference point whose own loss is `base`; `errors` are their standard errors.

    Losses are KL(dense || model) in nats a token where `measure` made them. reference: the choice of each group there; None for the dense model, and where
    that choice was left out.
    """

    groups: tuple[Group, ...]
    choices: tuple[Scheme, ...]
    losses: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    base: float
    reference: tuple[int, ...] | None
    made: Mapping[str, Any] = field(default_factory=dict)  # the model, the text and the options that they were measured with

    def predicted(self, selection: Sequence[int]) -> float:
        """The loss of an allocation, if losses add up."""
        return math.fsum([self.base, *(row[choice] for row, choice in zip(self.losses, selection, strict=True))])

    def only(self, choices: Sequence[Scheme]) -> Sensitivities:
        """The same for some of the choices, in their order."""
        if tuple(choices) == self.choices:
            return self
        places = [self.choices.index(choice) for choice in choices]
        losses, errors = (tuple(tuple(row[place] for place in places) for row in rows) for rows in (self.losses, self.errors))
        kept = self.reference is not None and all(choice in places for choice in self.reference)
        reference = tuple(places.index(choice) for choice in self.reference or ()) if kept else None
        return replace(self, choices=tuple(choices), losses=losses, errors=errors, reference=reference)

    def write(self, path: Path) -> None:
        """As JSON, for other budgets."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Sensitivities:
        """Errors: OptionError for a file that is none."""
        try:
            data = json.loads(path.read_bytes())
            if data.pop("format") != FORMAT:
                raise ValueError("written by another version")
            data |= {name: tuple(map(tuple, data[name])) for name in ("groups", "losses", "errors")}
            data["choices"] = tuple(Scheme(**choice) for choice in data["choices"])
            if data["reference"] is not None:
                data["reference"] = tuple(data["reference"])
            found = cls(**data)
            shapes = {(len(table), *map(len, table)) for table in (found.losses, found.errors)}
            if shapes != {(len(found.groups), *[len(found.choices)] * len(found.groups))} or not all(math.isfinite(x) for row in found.losses for x in row):
                raise ValueError("its tables are not what they should be")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"--sensitivities {path}: {getattr(error, 'strerror', None) or error}; measure again without it") from None
        return found


def measure(
    checkpoint: Checkpoint, groups: Sequence[Group], choices: Sequence[Any], make: Make, rows: Tensor, *,
    reference: Sequence[int] | None = None, device: str = "cpu", progress: Progress | None = None,
) -> Sensitivities:  # fmt: skip
    """The loss of each choice of each group: int64 rows [windows, window] of the text, and the model in a scheme from `make`.

    Memory: the model in float32, twice in its own dtype, and what `Replay` keeps. One pass of the text through the blocks behind a group for each choice.
    """
    progress, roles = progress or quiet(), describe(checkpoint)
    where = [parameters_of(roles, group) for group in groups]
    replay = Replay(load_model(checkpoint).to(device), rows)
    loader = Loader(checkpoint, make, where)
    standing = tuple(reference) if reference is not None else (None,) * len(groups)
    for number in dict.fromkeys(number for number in standing if number is not None):
        weights = loader.weights(choices[number])
        replay.fill({name: weights[name] for names, own in zip(where, standing, strict=True) if own == number for name in names})
    base = replay.record()
    losses, errors = ([[0.0] * len(choices) for _ in groups] for _ in range(2))
    with progress.phase("sensitivities", sum(number != own for own in standing for number in range(len(choices))), " measurements"):
        for number, choice in enumerate(choices):
            if all(own == number for own in standing):
                continue
            weights = loader.weights(choice)
            for group, names in enumerate(where):
                if standing[group] == number:
                    continue
                with replay.changed({name: weights[name] for name in names}):
                    change = replay.divergence_after(names) - base
                losses[group][number], errors[group][number] = float(change.mean()), standard_error(change)
                progress.advance(1)
    tables = [tuple(map(tuple, table)) for table in (losses, errors)]
    return Sensitivities(tuple(groups), tuple(choices), tables[0], tables[1], float(base.mean()), None if reference is None else tuple(reference))


def standard_error(change: Tensor) -> float:
    """Of the mean of a value for each window, from its two halves."""
    return float((change[::2].mean() - change[1::2].mean()).abs() / 2) if len(change) > 1 else 0.0


def parameters_of(roles: ModelMap, group: Group) -> tuple[str, ...]:
    """The parameters of the transformers model that hold a group. Errors: CheckpointError for a weight that has no place in it."""
    if lost := next((name for name in group if roles.tensors[name].parameter is None), None):
        raise CheckpointError(f"{lost} has no place in the model that config.json describes, so that its loss cannot be measured; leave it out with --exclude")
    return tuple(dict.fromkeys(str(roles.tensors[name].parameter) for name in group))


class Loader:
    """Quantised weights by the names of the model's parameters, which may pack what the checkpoint stores apart; in the dtype that is stored."""

    def __init__(self, checkpoint: Checkpoint, make: Make, where: Sequence[Sequence[str]]) -> None:
        self.make, self.names = make, [name for names in where for name in names]
        tags = {spec.dtype for spec in checkpoint.specs.values() if spec.is_float}
        self.dtype = TORCH_DTYPES[tags.pop()] if len(tags) == 1 else torch.float32

    def weights(self, choice: Any) -> dict[str, Tensor]:
        """Those of the model in one choice."""
        state = load_model(self.make(choice), self.dtype).state_dict()
        return {name: state[name] for name in self.names}
