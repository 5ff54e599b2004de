"""Where a model's layers are: its stacks, what stands before and after each, and what config.json says of every layer.

A model of one stack (a causal model, BERT) is one part without a name. Where transformers builds it of several modules with stacks of their own (an
encoder and a decoder; a vision tower, a projector and a language model), each module is a part.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .model import Meaning, describe, layer_of, meta_model

_COUNT = re.compile(r"(?:num_|n_)?(?:hidden_)?layers?|depth")  # a key of config.json with the number of layers
_PER_LAYER = re.compile(r"layer|block|window|pattern|heads|intermediate|sparsity|types?$")  # keys whose lists have an entry for every layer
_NUMBER = re.compile(r"(?:^|\.)\d+\.")
_ATTENTION = re.compile(r"\.[^.]*(?:attn|attention|att\.)", re.IGNORECASE)  # the module of a block that attends, by its name
_LAST_NORM = re.compile(r"final|^norm$|^ln_f$")


Kind = Literal["attention", "mlp", "rest"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Position:
    """Where a tensor stands in its model: how far along the stack, 0 before the first layer and 1 after the last, and in what kind of layer.

    "attention": in a block, in a module with attention in its name; "mlp": all else in a block but norms; "rest": norms, and what is in no block.
    """

    along: float
    kind: Kind


@dataclass(frozen=True)
class Part:
    """A stack of layers, and the tensors that stand before it (embeddings) and after it (the last norm, the head)."""

    name: str
    stack: str | None
    layers: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    config: tuple[str, ...] = ()  # the keys that lead to this part's table in config.json
    counts: tuple[str, ...] = ()  # keys of that table with the number of layers
    per_layer: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # lists with an entry for each layer
    layer_sets: Mapping[str, Sequence[int]] = field(default_factory=dict)  # lists of numbers of layers
    layer_tables: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)  # tables with entries for some layers, by their numbers
    stated: Collection[str] = ()  # which of these config.json itself has; the others are transformers' defaults

    def moved(self, tensor: str, old: int, new: int) -> str:
        """A tensor's name when its layer stands at another place."""
        start = f"{self.stack}." if self.stack else ""
        return f"{start}{new}{tensor.removeprefix(f'{start}{old}')}"


def along(layer: int, count: int) -> float:
    """How far along `count` layers one is, 0 to 1; the only one is at the end, as in mergekit."""
    return layer / (count - 1) if count > 1 else 1.0


def layer_places(names: Iterable[str]) -> dict[str, float]:
    """How far along its stack the layer of a tensor is, for each tensor in a layer; by the names alone."""
    places = {name: place for name in names if (place := layer_of(name))}
    stacks: dict[str, set[int]] = {}
    for stack, block in places.values():
        stacks.setdefault(stack, set()).add(block)
    whole = {stack: len(blocks) for stack, blocks in stacks.items() if len(blocks) == max(blocks) + 1}
    return {name: along(block, whole[stack]) for name, (stack, block) in places.items() if stack in whole}


def between(points: Sequence[float], t: float) -> float:
    """The value at `t`, 0 to 1, of a line through points at equal distances; where two neighbours are equal, exactly theirs."""
    where = t * (len(points) - 1)
    first = int(where)
    begun = float(points[first])
    return begun + (where - first) * (float(points[min(first + 1, len(points) - 1)]) - begun)


def positions(checkpoint: Checkpoint) -> dict[str, Position]:
    """Where every tensor stands. Errors: CheckpointError for a model without a stack of layers, and as `parts_of`."""
    meanings, parts = describe(checkpoint).tensors, list(parts_of(checkpoint).values())
    if not any(part.layers for part in parts):
        raise CheckpointError(f"{checkpoint.label} has no stack of layers, so that no option can vary along it or by kind of layer")
    found: dict[str, Position] = {}
    for part in parts:
        places = [(0.0, part.before), *((along(number, len(part.layers)), layer) for number, layer in enumerate(part.layers)), (1.0, part.after)]
        found |= {name: Position(place, _kind(meanings[name])) for place, names in places for name in names}
    return found


def _kind(meaning: Meaning) -> Kind:
    if meaning.block is None or meaning.role == "norm":
        return "rest"
    return "attention" if _ATTENTION.search(meaning.name.removeprefix(meaning.stack or "")) else "mlp"


def parts_of(checkpoint: Checkpoint) -> dict[str, Part]:
    """The parts of a model by their names: those of the architecture's modules, and `text_decoder` and `vision_tower` for what these are.

    One part, "", where there is one stack. Reads headers and config.json only.
    """
    meanings = describe(checkpoint).tensors
    model = _architecture(checkpoint)
    modules = _modules(model) if model is not None else {}
    decoder = _module_of(model, modules, "get_decoder")
    owned: dict[str, list[Meaning]] = {name: [] for name in modules} or {"": []}
    home = decoder or next(reversed(owned))  # of what stands outside of all modules
    for meaning in meanings.values():
        owned[_owner(meaning, model, modules, home)].append(meaning)
    order = {name: number for number, name in enumerate(model.state_dict())} if model is not None else {}
    parts = {name: _part(name, tensors, checkpoint, order, model, modules.get(name)) for name, tensors in owned.items() if tensors}
    for alias, name in (("text_decoder", decoder), ("vision_tower", _module_of(model, modules, "get_encoder", modality="image"))):
        if name in parts and modules:
            parts.setdefault(alias, parts[name])
    return parts


def layer_entries(part: Part, taken: Sequence[tuple[Part, int]]) -> dict[str, Any]:
    """What the part's table of config.json says when its layers are these ones, each of some part: how many there are, and what goes by layers; but for
    what it does not say and what says nothing."""
    counts: dict[str, Any] = dict.fromkeys(part.counts, len(taken))
    lists = {key: [other.per_layer[key][layer] for other, layer in taken] for key in part.per_layer}
    sets = {key: [new for new, (other, layer) in enumerate(taken) if layer in other.layer_sets.get(key, ())] for key in part.layer_sets}
    tables = {
        key: {str(new): other.layer_tables[key][layer] for new, (other, layer) in enumerate(taken) if layer in other.layer_tables.get(key, ())}
        for key in part.layer_tables
    }  # fmt: skip
    # Told by what was said of all layers: what transformers takes for others where nothing is said need not be what it took for these.
    others = [part, *(other for other, _ in taken)]
    silent = {key for key in lists if all(item == part.per_layer[key][0] for other in others for item in other.per_layer[key])}
    silent |= {key for key in sets if not any(other.layer_sets.get(key) for other in others)}
    return {key: value for key, value in {**counts, **lists, **sets, **tables}.items() if key not in silent or key in part.stated}


def with_table(model: Checkpoint, path: Sequence[str], entries: Mapping[str, Any]) -> Checkpoint:
    """The model under a config.json with these entries in the table at `path`; a number of layers is not added where another one is stated."""
    table = model.config
    for key in path:
        table = table.get(key, {})
    stated = any(key in table for key, value in entries.items() if isinstance(value, int))
    wanted = {key: value for key, value in entries.items() if key in table or not (stated and isinstance(value, int))}
    if all(table.get(key) == value for key, value in wanted.items()):
        return model
    return model.with_config(**({path[0]: {**table, **wanted}} if path else wanted))


def of_layers(model: Checkpoint, part: Part, layers: Sequence[int]) -> Checkpoint:
    """The model under a config.json that speaks of these of a part's layers, in this order."""
    return with_table(model, part.config, layer_entries(part, [(part, layer) for layer in layers]))


def _architecture(checkpoint: Checkpoint) -> Any:
    """The empty model of its config.json; None where nobody can tell."""
    try:
        return meta_model(checkpoint) if checkpoint.config else None
    except CheckpointError:
        return None


def _modules(model: Any) -> dict[str, Any]:
    """The modules of a model that has several with stacks of layers; none for another."""
    from torch.nn import ModuleList

    children = dict(model.base_model.named_children())
    stacked = [name for name, child in children.items() if not isinstance(child, ModuleList) and any(isinstance(m, ModuleList) for m in child.modules())]
    return children if len(stacked) > 1 else {}


def _module_of(model: Any, modules: Mapping[str, Any], getter: str, **arguments: str) -> str:
    """The name of the module that the model answers with, "" for none."""
    try:
        wanted = getattr(model, getter)(**arguments)
    except (AttributeError, TypeError, ValueError):
        return ""
    return next((name for name, module in modules.items() if module is wanted), "")


def _owner(meaning: Meaning, model: Any, modules: Mapping[str, Any], home: str) -> str:
    """The module in which a tensor stands; a head, and what is outside of them all, goes home: with the decoder."""
    path = meaning.parameter or meaning.name
    if model is not None and model.base_model is not model:
        path = path.removeprefix(f"{model.base_model_prefix}.")
    if meaning.role == "head":
        return home
    if meaning.parameter is None:
        return next((part for part in path.split(".") if part in modules), home)
    first = path.partition(".")[0]
    return first if first in modules else home


def _part(name: str, meanings: Sequence[Meaning], checkpoint: Checkpoint, order: Mapping[str, int], model: Any, module: Any) -> Part:
    sizes: Counter[str] = Counter()
    for meaning in meanings:
        if meaning.stack is not None:
            sizes[meaning.stack] += checkpoint.specs[meaning.name].numel
    stack = max(sizes, key=lambda known: sizes[known], default=None)
    blocks: dict[int, list[str]] = {}
    for meaning in meanings:
        if meaning.stack == stack and meaning.block is not None:
            blocks.setdefault(meaning.block, []).append(meaning.name)
    if blocks and len(blocks) != max(blocks) + 1:
        raise CheckpointError(f"{checkpoint.label}: of the layers {stack}.0 to {stack}.{max(blocks)} some have no tensors; layers cannot be told apart")
    layers = tuple(tuple(blocks[number]) for number in sorted(blocks))
    numbers = {meaning.name: order[meaning.parameter] for meaning in meanings if meaning.parameter is not None and meaning.parameter in order}
    first = min((numbers[name] for layer in layers for name in layer if name in numbers), default=None)

    def stands_before(meaning: Meaning) -> bool:
        if meaning.role == "head" or (meaning.role == "norm" and _LAST_NORM.search(meaning.module.rpartition(".")[2])):
            return False
        if first is not None and meaning.name in numbers:
            return numbers[meaning.name] < first
        return meaning.role == "embedding" or "embed" in meaning.name

    loose = [meaning for meaning in meanings if meaning.stack != stack or meaning.block is None]
    before = dict.fromkeys(meaning.name for meaning in loose if stands_before(meaning))
    after = tuple(meaning.name for meaning in loose if meaning.name not in before)
    return Part(name, stack, layers, tuple(before), after, **_said_of_layers(name, len(layers), checkpoint, model, module))


def _said_of_layers(name: str, count: int, checkpoint: Checkpoint, model: Any, module: Any) -> dict[str, Any]:
    """Where config.json speaks of this many layers: what a part says of it, by the names of its fields."""
    places: list[tuple[tuple[str, ...], dict[str, Any], Mapping[str, str]]] = []
    if model is not None:
        whole = model.config
        tables = {(): whole, **{(key,): getattr(whole, key) for key in whole.sub_configs if getattr(whole, key, None) is not None}}
        own = getattr(module, "config", whole)
        mine = [way for way, table in tables.items() if table is own and own is not whole] or list(tables)
        places = [(way, tables[way].to_dict(), type(tables[way]).attribute_map) for way in mine]
    elif checkpoint.config:
        text = checkpoint.config.get("text_config")
        places = [((), checkpoint.config, {}), *([(("text_config",), text, {})] if isinstance(text, dict) else [])]
    for way, table, other_names in places:
        numbers = [key for key, value in table.items() if type(value) is int and value == count]
        keys = [key for key in numbers if name and name in key and "layers" in key] or [key for key in numbers if _COUNT.fullmatch(key)]
        if keys:
            keys += [key for key in numbers if other_names.get(key) in keys and key not in keys]
            lists = {key: list(value) for key, value in table.items() if isinstance(value, list | tuple) and _PER_LAYER.search(key)}
            per_layer: dict[str, Sequence[Any]] = {key: value for key, value in lists.items() if len(value) == count}
            sets: dict[str, Sequence[int]] = {
                key: value for key, value in lists.items()
                if len(value) != count and "layers" in key and all(type(item) is int and 0 <= item < count for item in value)
            }  # fmt: skip
            numbered = {
                key: {int(number): entry for number, entry in value.items()} for key, value in table.items()
                if isinstance(value, dict) and value and "layer" in key and all(str(number).isdecimal() and int(number) < count for number in value)
            }  # fmt: skip
            written: Mapping[str, Any] = checkpoint.config
            for part in way:
                written = written.get(part) or {}
            stated = frozenset(key for key in (*per_layer, *sets, *numbered) if key in written)
            return {"config": way, "counts": tuple(keys), "per_layer": per_layer, "layer_sets": sets, "layer_tables": numbered, "stated": stated}
    return {}


def layer_misfits(checkpoint: Checkpoint) -> dict[str, str]:
    """What the layers of a checkpoint have that its architecture lacks there, or lack: by the tensor's name without its number, a sentence each."""
    model = _architecture(checkpoint)
    if model is None:
        return {}
    tensors, expected = describe(checkpoint).tensors, dict.fromkeys(model.state_dict())
    unknown = [name for name, meaning in tensors.items() if meaning.parameter is None]
    found = {name: f"{name} has no place in {type(model).__name__} as config.json describes it" for name in unknown}
    have = {meaning.parameter for meaning in tensors.values()}
    found |= {name: f"{name} is missing" for name in expected if name not in have and name not in model.all_tied_weights_keys}
    first: dict[str, str] = {}
    for name, problem in found.items():
        if layer_of(name):
            first.setdefault(_NUMBER.sub(".*.", name, count=1), problem)
    return first
