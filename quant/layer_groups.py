"""The groups of layers that share a scheme, and what each scheme of each costs to store, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_plus.checkpoint import Checkpoint, Plan, SaveOptions
from mergekit_plus.checkpoint.layout import plan_save
from mergekit_plus.checkpoint.plan import is_copy
from mergekit_plus.model import describe

from .formats import FORMATS
from .plan import quantize
from .quantized import Scheme
from .sensitivity import Group


def groups_of(checkpoint: Checkpoint, scheme: Scheme, exclude: Sequence[str] = ()) -> tuple[Group, ...]:
    """The weights that `quantize` would quantise, in groups that must share a scheme: what servers fuse, what is tied, all experts of a layer.

    Errors: as `quantize`.
    """
    plan = quantize(checkpoint, scheme, format_name="dense", exclude=exclude).source
    assert isinstance(plan, Plan)
    names = [name for name, step in plan.step_of.items() if not is_copy(step)]
    roles = describe(checkpoint)
    leader = {name: name for name in names}
    for linked in (*roles.fused, *roles.tied):
        inside = [leader[name] for name in linked if name in leader]
        for name, first in leader.items():
            if first in inside:
                leader[name] = inside[0]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(leader[name], []).append(name)
    return tuple(tuple(group) for group in groups.values())


def stored_bits(checkpoint: Checkpoint, groups: Sequence[Group], choices: Sequence[Scheme], format_name: str) -> list[list[int]]:
    """Bits of all that a file holds for a group [groups, choices]: codes, scales, zero points, shapes, padding."""
    specs = FORMATS[format_name].specs
    return [[8 * sum(spec.nbytes for name in group for spec in specs(checkpoint.specs[name], choice)) for choice in choices] for group in groups]


def weights_of(checkpoint: Checkpoint, groups: Sequence[Group]) -> int:
    """How many weights the groups hold."""
    return sum(checkpoint.specs[name].numel for group in groups for name in group)


def file_size(quantised: Checkpoint) -> int:
    """Bytes of the weight files that a checkpoint becomes, with their headers and all that is not quantised."""
    return plan_save(quantised, Path("model"), SaveOptions()).bytes_written


def label(group: Group) -> str:
    """A group as a person reads it: "model.layers.0.self_attn.q_proj/k_proj/v_proj"."""
    modules = [name.removesuffix(".weight") for name in group]
    parents = {module.rpartition(".")[0] for module in modules}
    if len(parents) == 1:
        return f"{modules[0].rpartition('.')[0]}.{'/'.join(module.rpartition('.')[2] for module in modules)}".removeprefix(".")
    return f"{modules[0]} and {len(modules) - 1} more"
