"""A folded model that stores what blocks share once: the compact checkpoint.

    model.layers.0.self_attn.q_proj.weight           what a group shares, under the name that it has in the group's first block
    model.layers.1.input_layernorm.weight            what is private (norms), for every block
    model.layers.1.self_attn.q_proj.lora_A.weight    the block's own voice, where it has one: its weight is shared + B A, A [rank, in], B [out, rank]
    config.json                                      that of the expanded model; `compact` says which blocks share, and what it is a model of

Its model_type is none that transformers knows, so that what cannot share weights refuses it. `Checkpoint.open` gives the expanded model, each tensor
computed as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.adapters.product import block_rows, blocks, working_dtype
from mergekit_plus.checkpoint import Checkpoint, Plan, Step, copy_step
from mergekit_plus.checkpoint.folder import COMPACT
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.layers import Part
from mergekit_plus.model import Meaning, describe, layer_of

from .surgery import Fold, operated, shareable, stack_of

KEY = "compact"  # of config.json
CODE, ARCHITECTURE = "modeling_compact.py", "CompactModelForCausalLM"  # what transformers runs with trust_remote_code, and its class
# A type that transformers does not know, and, for who names a class that it knows, a file of weights that there is not.
DISK = {"model_type": COMPACT, "transformers_weights": "compact-needs-trust_remote_code-or-expanding.safetensors"}
OWN = ("model_type", "architectures", "auto_map", "transformers_weights")  # keys of config.json that say something else of the expanded model
VERSION = 1
MOST = 1 << 14  # blocks, above which a config.json is not believed
A, B = "lora_A.weight", "lora_B.weight"

Factor = tuple[Checkpoint, str, str]  # a checkpoint, and the names of A [rank, in] and B [out, rank] in it


def compacted(checkpoint: Checkpoint, fold: Fold, factors: Mapping[str, Factor] | None = None) -> Checkpoint:
    """An ordinary model after surgery, what the blocks of a group share stored once.

    factors: the own voices of linear layers, by the module's name in the result ("model.layers.1.self_attn.q_proj").
    Errors: as `folded`; OptionError for factors that do not fit; CheckpointError for blocks of a group that are not alike, and without a config.json.
    """
    if not isinstance(checkpoint.config.get("model_type"), str):
        raise CheckpointError(f"{checkpoint.label} has no config.json with a model_type, to say which blocks share; open the model's folder")
    part = stack_of(checkpoint)
    shared = shareable(checkpoint, part)
    result = operated(checkpoint, fold, part, shared, once=True)
    private = _private(checkpoint, fold, part, shared)
    meanings = describe(checkpoint).tensors
    voices = [step for module, factor in (factors or {}).items() for step in _voice_steps(checkpoint, fold, part, meanings, module, factor)]
    assert isinstance(result.source, Plan)
    said = {
        "version": VERSION, "expanded": {key: checkpoint.config[key] for key in OWN if key in checkpoint.config}, "stack": part.stack,
        "kept": list(fold.kept), "groups": list(fold.groups), "parents": list(fold.parents), "private": private,
        **({"ranks": _ranks(voices, len(fold.kept))} if voices else {}),
    }  # fmt: skip
    result = with_code(replace(result, label=f"{result.label}, compact", source=Plan([*result.source.steps, *voices])))
    auto_map = {"AutoConfig": f"{CODE[:-3]}.CompactConfig", "AutoModelForCausalLM": f"{CODE[:-3]}.{ARCHITECTURE}"}
    return result.with_config(**DISK, architectures=[ARCHITECTURE], auto_map=auto_map, **{KEY: said})


def voice_of(name: str) -> str | None:
    """The linear layer whose voice a tensor is a factor of, by their names; None for another tensor."""
    return next((name.removesuffix(f".{factor}") for factor in (A, B) if name.endswith(f".{factor}")), None)


def with_code(compact: Checkpoint) -> Checkpoint:
    """A compact checkpoint with the file that transformers runs; one that was opened comes without."""
    return replace(compact, files={**compact.files, CODE: Path(__file__).with_name(CODE).read_bytes()})


def fold_of(checkpoint: Checkpoint) -> Fold | None:
    """What a compact checkpoint says of its blocks; None for another. Errors: CheckpointError where it does not fit its tensors."""
    layout = _layout(checkpoint)
    return layout.fold if layout else None


def expanded(checkpoint: Checkpoint) -> Checkpoint:
    """The ordinary model that a compact checkpoint stands for: copies, and shared + B A in float32, rounded once; another checkpoint as it is.

    Reads headers and config.json only. Errors: CheckpointError where config.json does not fit the tensors.
    """
    layout = _layout(checkpoint)
    if layout is None:
        return checkpoint
    files = {name: content for name, content in checkpoint.files.items() if name != CODE}
    result = replace(checkpoint, source=Plan(_expanding(checkpoint, layout)), files=files)
    return result.with_config(**{**dict.fromkeys((KEY, *OWN)), **layout.config})


# ---- writing ----


def _private(checkpoint: Checkpoint, fold: Fold, part: Part, shared: frozenset[str]) -> list[str]:
    """What every block has of its own, by its name in the block. Errors: CheckpointError where blocks of a group are not alike."""
    found: dict[str, None] = {}
    for group in range(len(fold.parents)):
        first, *others = ({_local(name, part.stack or "", block): name for name in part.layers[block]} for block in fold.members(group))
        for other in others:
            for local in first.keys() ^ other.keys():
                raise CheckpointError(f"{checkpoint.label}: {first.get(local) or other[local]} is in one block of a group alone; fold blocks of one kind only")
            for local, name in first.items():
                a, b = checkpoint.specs[name], checkpoint.specs[other[local]]
                if (a.shape, a.dtype) != (b.shape, b.dtype) and name in shared:
                    raise CheckpointError(f"{checkpoint.label}: {name} and {b.name} are to be one weight, but are not alike; fold blocks of one kind only")
        found.update(dict.fromkeys(local for local, name in first.items() if name not in shared))
    return list(found)


def _voice_steps(
    checkpoint: Checkpoint, fold: Fold, part: Part, meanings: Mapping[str, Meaning], module: str, factor: Factor
) -> Iterator[Step]:
    """The copies of a module's A and B. Errors: OptionError where they do not fit it."""
    place = layer_of(f"{module}.")
    if place is None or place[0] != (part.stack or "") or place[1] >= len(fold.kept):
        raise OptionError(f"{module} is not a module of the blocks 0 to {len(fold.kept) - 1} that the result has")
    name = part.moved(f"{module}.weight", place[1], fold.sources(place[1])[0])
    meaning = meanings.get(name)
    if meaning is None:
        raise OptionError(f"{module}: {checkpoint.label} has no tensor '{name}'.{nearest(name, part.layers[0])}")
    if meaning.role != "linear" or meaning.transposed or not (meaning.parameter or name).endswith(f".{_local(name, part.stack or '', meaning.block or 0)}"):
        raise OptionError(f"{module} is no plain linear layer, so it cannot have a voice of its own")
    (source, *names), (rows, columns) = factor, checkpoint.specs[name].shape
    a, b = (source.specs.get(one) for one in names)
    if a is None or b is None or len(a.shape) != 2 or a.shape[1:] != (columns,) or b.shape != (rows, a.rows) or not (a.is_float and b.is_float) or not a.rows:
        shapes = " and ".join(str(spec.shape) if spec else "nothing" for spec in (a, b))
        raise OptionError(f"{module}: A and B must be [rank, {columns}] and [{rows}, rank], not {shapes} ({names[0]}, {names[1]} in {source.label})")
    yield copy_step(source, names[0], f"{module}.{A}")
    yield copy_step(source, names[1], f"{module}.{B}")


def _ranks(voices: Sequence[Step], count: int) -> dict[str, list[int]]:
    """The rank that each linear layer has in every block, 0 for none, by its name in the block."""
    ranks: dict[str, list[int]] = {}
    for spec in (step.writes[0] for step in voices):
        if spec.name.endswith(A):
            (stack, place) = layer_of(spec.name) or ("", 0)
            ranks.setdefault(_local(spec.name, stack, place).removesuffix(f".{A}"), [0] * count)[place] = spec.rows
    return ranks


# ---- reading ----


@dataclass(frozen=True)
class _Layout:
    """What config.json says of a compact checkpoint that fits its tensors. Names are those in a block."""

    config: Mapping[str, Any]  # what config.json says otherwise when it is expanded
    fold: Fold
    stack: str
    private: frozenset[str]
    ranks: Mapping[str, Sequence[int]]  # of linear layers, for every block
    stored: Mapping[int, Sequence[str]]  # what stands in the checkpoint for each block, voices aside

    def name(self, place: int, local: str) -> str:
        """The whole name of a tensor of a block."""
        return f"{self.stack}.{place}.{local}" if self.stack else f"{place}.{local}"

    def voices(self, place: int) -> dict[str, int]:
        """The linear layers of a block that have a voice, with its rank."""
        return {local: ranks[place] for local, ranks in self.ranks.items() if ranks[place]}


def _layout(checkpoint: Checkpoint) -> _Layout | None:
    """None for what is no compact checkpoint. Errors: CheckpointError where its config.json is not what describes one, or does not fit."""
    said = checkpoint.config.get(KEY)
    if checkpoint.config.get("model_type") != COMPACT:
        return None
    try:
        return _checked(checkpoint, said)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{checkpoint.label}: '{KEY}' in config.json does not describe its tensors ({reason})") from None


def _checked(checkpoint: Checkpoint, said: Any) -> _Layout:
    if said["version"] != VERSION:
        raise ValueError(f"its version is {said['version']!r}, and {VERSION} is the one that is known here")
    kept, groups = _numbers(said["kept"]), _numbers(said["groups"])
    fold = Fold(kept, groups, tuple(said["parents"]))
    known = 1 + max([*kept, *_numbers([parent for parent in fold.parents if parent is not None])], default=-1)
    if problems := list(fold.problems(known)):
        raise ValueError(problems[0])
    stack, private, ranks = said["stack"] or "", frozenset(said["private"]), {local: _numbers(each) for local, each in said.get("ranks", {}).items()}
    if not isinstance(stack, str) or any(len(each) != len(kept) for each in ranks.values()):
        raise ValueError("stack is a name, and ranks are a number for every block")
    config = {key: value for key, value in said["expanded"].items() if key in OWN}
    if not isinstance(config["model_type"], str) or config["model_type"] == COMPACT:
        raise ValueError("expanded has the model_type of an ordinary model")
    stored: dict[int, list[str]] = {place: [] for place in range(len(kept))}
    for name in checkpoint.specs:
        if (found := layer_of(name)) and found[0] == stack:
            stored.setdefault(found[1], []).append(_local(name, stack, found[1]))
    layout = _Layout(config, fold, stack, private, ranks, {})
    own = {place: [local for local in there if not local.endswith((A, B))] for place, there in stored.items()}
    for place, there in stored.items():
        if place >= len(kept):
            raise ValueError(f"{layout.name(place, there[0])} is in a block of which nothing is said")
        if not own[fold.first(place)]:
            raise ValueError(f"the first block of a group, {layout.name(fold.first(place), '*')}, has no tensors")
        wanted = own[fold.first(place)] if fold.first(place) == place else [local for local in own[fold.first(place)] if local in private]
        voices = [f"{local}.{ab}" for local in layout.voices(place) for ab in (A, B)]
        for local in sorted({*wanted, *voices} ^ set(there)):
            raise ValueError(f"{layout.name(place, local)} is {'one too many' if local in there else 'missing'}")
        for local, rank in layout.voices(place).items():
            weight, a, b = (
                checkpoint.specs[layout.name(at, f"{local}.{leaf}")] for at, leaf in ((fold.first(place), "weight"), (place, A), (place, B))
            )  # fmt: skip
            if len(weight.shape) != 2 or a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
                raise ValueError(f"{a.name} {a.shape} and {b.name} {b.shape} are no voice of rank {rank} beside {weight.shape}")
    return replace(layout, stored=own)


def _local(name: str, stack: str, place: int) -> str:
    """A tensor's name in its block."""
    return name.removeprefix(f"{stack}.{place}." if stack else f"{place}.")


def _numbers(said: Any) -> tuple[int, ...]:
    if not isinstance(said, list) or len(said) > MOST or not all(type(number) is int and 0 <= number < MOST for number in said):
        raise ValueError(f"lists of at most {MOST} numbers, from 0, are wanted")
    return tuple(said)


def _expanding(checkpoint: Checkpoint, layout: _Layout) -> Iterator[Step]:
    """The steps that write the expanded model's tensors."""
    inside = {layout.name(place, local) for place, found in layout.stored.items() for local in found}
    inside |= {layout.name(place, f"{local}.{ab}") for place in layout.stored for local in layout.voices(place) for ab in (A, B)}
    yield from (copy_step(checkpoint, name) for name in checkpoint.specs if name not in inside)
    for place in layout.stored:
        first, voices = layout.fold.first(place), layout.voices(place)
        for local in layout.stored[first]:
            source = layout.name(place if local in layout.private else first, local)
            module = local.removesuffix(".weight")
            if local.endswith(".weight") and module in voices:
                yield _voiced(checkpoint, source, layout.name(place, module))
            else:
                yield copy_step(checkpoint, source, layout.name(place, local))


def _voiced(checkpoint: Checkpoint, shared: str, module: str) -> Step:
    """The weight of a module: what is shared + B A."""
    weight = checkpoint.specs[shared]
    reads = ((checkpoint, shared), (checkpoint, f"{module}.{B}"), (checkpoint, f"{module}.{A}"))
    return Step(reads, (replace(weight, name=f"{module}.weight"),), _add, block_rows(weight.shape[1]), takes=(None, None, "whole"))


def _add(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
    """Rows of W + B A, in float32, rounded once."""
    work = working_dtype(tensors[0].dtype)
    weight, (b, a) = tensors[0], (tensor.to(work) for tensor in tensors[1:])
    result = torch.empty_like(weight)
    with torch.no_grad():
        for rows in blocks(*weight.shape):
            result[rows] = weight[rows].to(work) + b[rows] @ a
    return (result,)
