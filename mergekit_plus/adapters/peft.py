"""A PEFT adapter, read: which module of the base each of its tensors changes, and how.

peft's folder holds adapter_model.safetensors and adapter_config.json. LoRA adds `scale * B A` to the weight of a module, with A [rank, in],
B [out, rank] and scale = alpha / rank (alpha / sqrt(rank) for rsLoRA); DoRA then sets the length of each output's row. What is not low-rank
(modules_to_save, trained biases, embeddings) is stored whole under the name of the parameter that it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.folder import ADAPTER_CONFIG
from ..errors import CheckpointError

PREFIX = "base_model.model."
NEURONS_TYPE = "NEURONS"  # in place of peft's types: of adapters of neurons (neurons.py)
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
# What changes the meaning of the tensors, or the base, in a way that `scale * B A` does not say.
_UNKNOWN = (
    "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config", "monteclora_config",
    "trainable_token_indices",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that take what A and B start with out of the base's weights


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to the weight of one module: `scale * B A`, A [rank, in], B [out, rank].

    `embedding`: A is [rank, vocabulary], B [width, rank], and the weight gets the transposed product. `magnitude`: DoRA's lengths of the rows,
    `bias`: what goes, scaled too, to the module's bias.
    """

    module: str  # as transformers names it: "model.layers.0.self_attn.q_proj"
    a: str  # names in the adapter
    b: str
    rank: int
    scale: float
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a product beside a module that is no embedding, and no more."""
        return not (self.magnitude or self.bias or self.embedding)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its tensors, and what each is for."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    lowrank: Mapping[str, LowRank]  # by module
    whole: Mapping[str, str]  # parameter of the base -> the tensor that replaces it

    @property
    def label(self) -> str:
        """What its user calls it."""
        return self.checkpoint.label

    @property
    def plain(self) -> bool:
        """Whether it is products beside modules that are no embeddings, and no more."""
        return not self.whole and all(module.plain for module in self.lowrank.values())


def open_adapter(ref: str | Path, cache: bool = False) -> Adapter:
    """Open the folder of a PEFT adapter, its adapter_model.safetensors, or `org/name[@revision]` on the Hub; reads headers only.

    Errors: CheckpointError where it cannot be opened, and as `read_adapter`.
    """
    return read_adapter(Checkpoint.open(ref, cache))


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """Say what every tensor of an adapter is for.

    Errors: CheckpointError for what is no LoRA adapter, for tensors that do not belong together, and for kinds of LoRA that are not known here.
    """
    config = _config(checkpoint)
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for tensor in checkpoint.specs:
        name = tensor.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name or ".token_adapter." in name:
            raise CheckpointError(f"{checkpoint.label}: what {tensor} is for is not known here; apply the adapter with peft (merge_and_unload)")
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if not parts and not whole:
        raise CheckpointError(f"{checkpoint.label} holds no tensors: the adapter is empty")
    lowrank = {module: _lowrank(checkpoint, config, module, found) for module, found in parts.items()}
    return Adapter(checkpoint, config, lowrank, whole)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """adapter_config.json, where it is one of LoRA."""
    if ADAPTER_CONFIG not in checkpoint.files:
        a_model = "a model, not an adapter; give a folder that peft saved, or make an adapter of a fine-tune: `compress adapter extract`"
        what = a_model if checkpoint.config else f"no adapter: there is no {ADAPTER_CONFIG} beside it, which peft writes; save it again with peft"
        raise CheckpointError(f"{checkpoint.label} is {what}")
    config = checkpoint.json_file(ADAPTER_CONFIG)
    way_out = "apply it with peft (merge_and_unload)"
    if config.get("peft_type") == NEURONS_TYPE:
        raise CheckpointError(f"{checkpoint.label} holds neurons, not products B A: it is no LoRA; with its base it is the model BASE+{checkpoint.label}")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{checkpoint.label} is an adapter of type {config.get('peft_type')}; LORA is the one that is known here: {way_out}")
    if asked := next((key for key in _UNKNOWN if config.get(key)), None):
        raise CheckpointError(f"{checkpoint.label}: {ADAPTER_CONFIG} sets {asked}, which is not known here: {way_out}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{checkpoint.label} belongs to a base that its initialisation ({start}) changed; save it with peft's path_initial_model_for_weight_conversion"
        )
    return config


def _lowrank(checkpoint: Checkpoint, config: Mapping[str, Any], module: str, parts: Mapping[str, str]) -> LowRank:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if missing := [name for name in names if name not in parts]:
        raise CheckpointError(f"{checkpoint.label}: {module} has {', '.join(parts)} but no {missing[0]}")
    a, b = (parts[name] for name in names)
    a_shape, b_shape = checkpoint.specs[a].shape, checkpoint.specs[b].shape
    rank, alpha = (_of_module(checkpoint, config, key, pattern, module) for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")))
    if len(a_shape) < 2 or len(b_shape) < 2 or a_shape[0] != rank or b_shape[1] != rank or any(length != 1 for length in b_shape[2:]):
        raise CheckpointError(f"{checkpoint.label}: {module} has rank {rank:g} by {ADAPTER_CONFIG}, but its A is {a_shape} and its B {b_shape}")
    for name in parts.values():
        if not checkpoint.specs[name].is_float:
            raise CheckpointError(f"{checkpoint.label}: {name} is {checkpoint.specs[name].dtype}, not a float tensor")
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(module, a, b, a_shape[0], scale, embedding, parts.get("lora_magnitude_vector"), parts.get("lora_B.bias"))


def _of_module(checkpoint: Checkpoint, config: Mapping[str, Any], key: str, pattern_key: str, module: str) -> float:
    """The rank or alpha of a module: that of the first pattern that is the end of its name, else the adapter's."""
    patterns = config.get(pattern_key) or {}
    try:
        value = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), config.get(key, 8))
        if isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ValueError(f"{value!r} for {module}")
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.label}: {ADAPTER_CONFIG} has an impossible {key} or {pattern_key}: {error}") from None
    return float(value)


def refuse_misfits(what: str, problems: Iterable[str], advice: str) -> None:
    """CheckpointError with the first problems of several."""
    found = list(problems)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(f"{what}: {'; '.join(found[:3])}{more}. {advice}")
