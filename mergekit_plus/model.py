"""What the tensors of a checkpoint mean: linears, embeddings, norms; which of them share a scheme, and which are one tensor twice.

The architecture says so: transformers builds it from config.json on the meta device (no weights, hundredths of a second) and `describe`
looks at its modules. What the architecture does not have (the experts of a checkpoint, which transformers packs; extra prediction
layers; a bare file; a model that transformers does not know) is told by names and shapes, and `notes` says that it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.folder import ADAPTER_CONFIG, DELTA_QUANT
from .checkpoint.spec import TensorSpec, natural_order
from .errors import CheckpointError

Role = Literal["linear", "embedding", "head", "norm", "bias", "conv", "other"]
ROLES: tuple[Role, ...] = get_args(Role)

# Siblings that servers (vLLM's packed_modules_mapping) load as one matrix, so that they must share bits, group size and being quantised.
FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
# The layers that make the neurons of an MLP and the one that reads them, by the last part of their names; between them stand elementwise functions alone.
NEURONS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))
NEURON_COUNTS = ("intermediate_size", "ffn_dim")  # keys of config.json
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")  # model.layers.0.mlp.experts.7.
_IN_STACK = re.compile(r"(?:(.*?)\.)?(\d+)\.")  # model.layers.3.
_ROUTERS = ("gate", "router", "shared_expert_gate")  # beside `experts`; servers keep them dense
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|score|classifier|qa_outputs|predictions\.decoder|lm_head\.decoder)|output|head")
_INPUT_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings|shared)")
_EMBEDDING = re.compile(r"embed(?!_out$)|^(?:wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln(?:_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What one tensor is.

    `stack` and `block` say where it stands: "model.layers", 3. `parameter` is its name in the transformers model, None where it has none;
    the experts of a layer share one where transformers packs them. `transposed`: a weight that is stored [in, out] (GPT-2's Conv1D).
    `converted`: the parameter is made of it, perhaps with others, by more than giving it another name.
    """

    name: str
    role: Role
    module: str
    stack: str | None
    block: int | None
    parameter: str | None
    transposed: bool = False
    converted: bool = False


@dataclass(frozen=True)
class ModelMap:
    """What every tensor of a checkpoint is, in natural order of the names.

    A norm's bias has the role "norm". A projection outside of the blocks that makes logits or scores is a "head". `fused` holds groups of
    linears that must share a scheme. `tied` holds the names of one tensor, that of the stored one first; it goes by config.json, so that
    several may be stored.
    """

    tensors: Mapping[str, Meaning]
    fused: tuple[tuple[str, ...], ...]
    tied: tuple[tuple[str, ...], ...]
    stack: str | None  # the prefix of the stack of blocks that holds most of the model
    notes: tuple[str, ...] = ()

    def names(self, role: Role) -> tuple[str, ...]:
        """The tensors of one role."""
        return tuple(name for name, meaning in self.tensors.items() if meaning.role == role)

    @property
    def parameters(self) -> dict[str, str]:
        """The parameter of the transformers model that each tensor is, where it alone is it: experts that are packed there are many tensors of one."""
        counts = Counter(meaning.parameter for meaning in self.tensors.values())
        return {name: meaning.parameter for name, meaning in self.tensors.items() if meaning.parameter and counts[meaning.parameter] == 1}

    @property
    def linears(self) -> tuple[str, ...]:
        """The weights of linear layers, [out, in] unless transposed; without heads, routers and embeddings."""
        return self.names("linear")

    @property
    def blocks(self) -> dict[int, tuple[str, ...]]:
        """The tensors of each block of the main stack."""
        found: dict[int, list[str]] = {}
        for name, meaning in self.tensors.items():
            if meaning.block is not None and meaning.stack == self.stack:
                found.setdefault(meaning.block, []).append(name)
        return {block: tuple(names) for block, names in sorted(found.items())}


def describe(checkpoint: Checkpoint) -> ModelMap:
    """What every tensor of the checkpoint is; reads headers and config.json only. Never fails for an architecture it does not know."""
    names = sorted(checkpoint.specs, key=natural_order)
    guessed = "what they are is told by their names and shapes"
    notes: list[str] = []
    model: Any = None
    if checkpoint.config:
        try:
            model = meta_model(checkpoint)
        except CheckpointError as error:
            notes.append(f"{error}; {len(names)} tensors: {guessed}")
    mixtures = {name.partition(".experts.")[0] for name in names if ".experts." in name}
    by_name = _by_name(checkpoint.specs)
    by_module, parameter_of = _by_module(model) if model is not None else (lambda name, spec: None, lambda name: (None, False))

    tensors: dict[str, Meaning] = {}
    stacks: Counter[str] = Counter()  # the elements in each
    for name in names:
        spec, module = checkpoint.specs[name], name.rpartition(".")[0]
        stack, block = layer_of(name) or (None, None)
        parameter, converted = parameter_of(name)
        role, transposed = (by_module(parameter, spec) if parameter is not None and not converted else None) or by_name(name)
        if role == "linear" and module.rpartition(".")[2] in _ROUTERS and module.rpartition(".")[0] in mixtures:
            role = "other"
        elif role == "linear" and stack is None and _HEAD.fullmatch(module):
            role = "head"
        if stack is not None:
            stacks[stack] += spec.numel
        tensors[name] = Meaning(name, role, module, stack, block, parameter, transposed, converted)

    if unknown := [name for name in names if model is not None and tensors[name].parameter is None]:
        notes.append(f"{len(unknown)} tensors are not in {type(model).__name__} ('{unknown[0]}'); {guessed}")
    if packed := [name for name in names if "experts" in name and tensors[name].role == "other" and len(checkpoint.specs[name].shape) == 3]:
        notes.append(f"{len(packed)} tensors pack the experts of a layer ('{packed[0]}'); they are not counted among the linear layers")
    linears = [name for name, meaning in tensors.items() if meaning.role == "linear"]
    alias = tied_alias(checkpoint, "lm_head.weight") if checkpoint.config.get("tie_word_embeddings") else None
    tied = _tied(model, tensors) if model is not None else ((alias, "lm_head.weight"),) if alias else ()
    return ModelMap(tensors, fused_groups(linears), tied, max(stacks, key=lambda stack: stacks[stack], default=None), tuple(notes))


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack and the block in which a tensor stands, by its name: "model.layers", 3."""
    place = _IN_STACK.match(name)
    return (place[1] or "", int(place[2])) if place else None


def fused_groups(linears: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of linear weights that must share a scheme: q/k/v, gate/up, and all experts of a layer. Only groups of two and more."""
    groups: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for name in linears:
        module = name.rpartition(".")[0]
        parent, _, leaf = module.rpartition(".")
        if expert := _EXPERT.match(name):
            groups.setdefault((expert[1], ()), {})[name] = name
        elif siblings := next((siblings for siblings in FUSED if leaf in siblings), None):
            groups.setdefault((parent, siblings), {})[leaf] = name
    ordered = ([found[leaf] for leaf in siblings or found if leaf in found] for (_, siblings), found in groups.items())
    return tuple(tuple(group) for group in ordered if len(group) > 1)


def tied_alias(checkpoint: Checkpoint, missing: str) -> str | None:
    """The present tensor of which a missing one is another name: `model.embed_tokens.weight` for `lm_head.weight`, None for no such.

    From names and config.json alone, without transformers, which takes seconds to import. A config.json that does not speak of tying ties,
    as those of transformers 4 do: a causal model without a head is no model.
    """
    config, specs = checkpoint.config, checkpoint.specs
    tie = config.get("tie_word_embeddings", _text_config(config).get("tie_word_embeddings"))
    headless = any(re.fullmatch(r"\w+(?<!LMHead)Model", name) for name in _architectures(config))
    module, _, leaf = missing.rpartition(".")
    if missing in specs or not config or tie is False or headless or leaf != "weight" or not _HEAD.fullmatch(module):
        return None
    tables = [name for name, spec in specs.items() if len(spec.shape) == 2 and _INPUT_EMBEDDING.fullmatch(name.removesuffix(".weight"))]
    return max(sorted(tables, key=natural_order), key=lambda name: specs[name].rows, default=None)


def vocabulary_size(checkpoint: Checkpoint) -> int | None:
    """The vocabulary size in config.json, that of the language model where it holds several; None where it says none."""
    size = _text_config(checkpoint.config).get("vocab_size")
    return size if isinstance(size, int) else None


# ---- already quantised? ----

_PACKED_NAMES = (
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_global_scale",
    ".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", "_proj_blocks", "_proj_scales",
)  # fmt: skip


def quantized_reason(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint counts as quantised and what to do about it, one sentence; None for a dense one. Reads headers and config only."""
    config = _text_config(checkpoint.config)
    declared = config.get("quantization_config") or config.get("compression_config")
    declared = declared if isinstance(declared, dict) else {}
    scheme = " ".join(str(declared[key]) for key in ("quant_method", "format") if declared.get(key))
    packed = next((name for name in checkpoint.specs if name.endswith(_PACKED_NAMES)), None)
    packed = packed or next((f"{name}, {spec.dtype}" for name, spec in checkpoint.specs.items() if _holds_codes(spec)), None)
    if packed is None and (not declared or declared.get("format") == "dense"):
        return None
    if packed is None:
        says = f"{checkpoint.label}: config.json says that it is quantized ({scheme or 'quantization_config'}), but its tensors are dense"
        return f"{says}; take the key 'quantization_config' out of config.json if they are right"
    mend = "use the unquantized model that it was made from"
    if declared.get("quant_method") in ("compressed-tensors", "gptq", "awq"):
        mend = f"unpack it first with `compress dequantize {checkpoint.label}`"
    return f"{checkpoint.label} is quantized already ({f'{scheme}, ' if scheme else ''}{packed}); {mend}"


def adapter_reason(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is no model but an adapter, and what to do about it; None for a model."""
    label = checkpoint.label
    if DELTA_QUANT in checkpoint.files:
        return f"{label} is the difference of a fine-tune, not a model; the base that it was made with and it are the model BASE+{label}"
    if ADAPTER_CONFIG not in checkpoint.files:
        return None
    return f"{label} is an adapter, not a model; a model with it applied is written MODEL+{label}, and `compress adapter merge` merges adapters"


def _holds_codes(spec: TensorSpec) -> bool:
    packed = spec.dtype in ("U8", "I8", "I32", "U32") and spec.name.endswith(".weight")
    return len(spec.shape) > 1 and (packed or spec.dtype.startswith(("F8_", "F6_", "F4")))


# ---- transformers ----


def architecture(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The transformers class of a model and its configuration; runs no code of the checkpoint's own.

    Errors: CheckpointError without a config.json, and for an architecture that transformers does not know.
    """
    config = checkpoint.config
    if not config:
        raise CheckpointError(f"{checkpoint.label} has no config.json, which says what model its tensors are; open the model's folder")
    import transformers

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{checkpoint.label}: transformers {transformers.__version__} does not know model_type {model_type!r}")
    # The tensors are dense here, and neither kernels nor code are fetched because a config.json asks for them.
    asked = ("quantization_config", "compression_config", "auto_map", "attn_implementation", "experts_implementation", "fusion_config")
    clean = {key: value for key, value in config.items() if key not in asked and not key.startswith("_")}
    try:
        parsed = transformers.CONFIG_MAPPING[model_type].from_dict(clean)
    except Exception as error:  # whatever a malformed config makes transformers raise
        raise CheckpointError(f"{checkpoint.label}: transformers cannot read config.json ({_one_line(error)})") from None
    for name in _architectures(config):
        known = getattr(transformers, name, None)
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            return known, parsed
    has_head = any(_HEAD.fullmatch(name.rpartition(".")[0]) for name in checkpoint.specs)
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING if has_head else transformers.MODEL_MAPPING
    if type(parsed) in mapping:
        return mapping[type(parsed)], parsed
    raise CheckpointError(f"{checkpoint.label}: transformers {transformers.__version__} has no model of type '{model_type}'")


def meta_model(checkpoint: Checkpoint) -> Any:
    """The model that config.json describes, on the meta device: modules and shapes without weights.

    Errors: CheckpointError as `architecture`, and where transformers cannot build it.
    """
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    layers = [value for part in parts for key, value in part.items() if isinstance(value, int) and re.search("layers|layer$|depth", key)]
    if max(layers, default=0) > len(checkpoint.specs) + 1000:
        raise CheckpointError(f"{checkpoint.label}: config.json asks for {max(layers)} layers, the tensors are {len(checkpoint.specs)}")
    import torch

    with silent_transformers():
        model_class, config = architecture(checkpoint)
        try:
            with torch.device("meta"):
                return model_class(config)
        except Exception as error:  # whatever a malformed config, or a package that the architecture needs, makes it raise
            raise CheckpointError(f"{checkpoint.label}: transformers cannot build {model_class.__name__} ({_one_line(error)})") from None


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No log lines and no bars of transformers inside; as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def _by_module(model: Any) -> tuple[Callable[[str, TensorSpec], tuple[Role, bool] | None], Callable[[str], tuple[str | None, bool]]]:
    """Two functions: the role (and transposed) of a parameter by its module, and the parameter behind a name in the checkpoint."""
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    modules, parameters = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings, converters = ([entry for entry in mapping if isinstance(entry, kind)] for kind in (WeightRenaming, WeightConverter))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def role(parameter: str, spec: TensorSpec) -> tuple[Role, bool] | None:
        path, _, leaf = parameter.rpartition(".")
        module = modules.get(path)
        if module is None or tuple(parameters[parameter].shape[1:]) != spec.shape[1:]:  # a vocabulary may have been resized
            return None
        if isinstance(module, nn.Embedding):
            return "embedding", False
        if "norm" in type(module).__name__.lower() or (leaf == "weight" and len(spec.shape) == 1):
            return "norm", False
        if leaf == "bias" and len(spec.shape) == 1:
            return "bias", False
        if leaf == "weight" and isinstance(module, (nn.Linear, Conv1D)):
            return ("head" if module is head else "linear"), isinstance(module, Conv1D)
        return ("conv" if leaf == "weight" and isinstance(module, nn.modules.conv._ConvNd) else "other"), False

    def parameter_of(name: str) -> tuple[str | None, bool]:
        if name in parameters:
            return name, False
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        return (renamed, converter is not None) if renamed in parameters else (None, False)

    return role, parameter_of


def _tied(model: Any, tensors: Mapping[str, Meaning]) -> tuple[tuple[str, ...], ...]:
    """Groups of names that are one tensor, in the checkpoint's names."""
    stored = {meaning.parameter: name for name, meaning in tensors.items() if meaning.parameter is not None}
    groups: dict[str, list[str]] = {}
    for alias, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(alias)
    named = ([stored.get(parameter, parameter) for parameter in group] for group in groups.values())
    return tuple(tuple(sorted(group, key=lambda name: name not in tensors)) for group in named if any(name in tensors for name in group))


# ---- names and shapes ----


def _by_name(specs: Mapping[str, TensorSpec]) -> Callable[[str], tuple[Role, bool]]:
    """A function: the role (and transposed) of a tensor by its name, its shape and its siblings."""

    def is_turned(name: str) -> bool:
        spec, bias = specs[name], specs.get(f"{name.removesuffix('weight')}bias")
        return len(spec.shape) == 2 and bias is not None and spec.shape[0] != spec.shape[1] and bias.shape == spec.shape[1:]

    any_turned = any(is_turned(name) for name in specs if name.endswith(".weight"))  # a square weight is stored as the others are

    def role(name: str) -> tuple[Role, bool]:
        module, _, leaf = name.rpartition(".")
        last, shape = module.rpartition(".")[2], specs[name].shape
        if leaf in ("weight", "bias", "gamma", "beta") and len(shape) == 1:
            weight = specs.get(f"{module}.weight")
            return ("bias" if leaf == "bias" and (weight is None or len(weight.shape) > 1) else "norm"), False
        if leaf != "weight" or len(shape) < 2 or not specs[name].is_float:
            return "other", False
        if len(shape) > 2:
            return ("conv" if "conv" in last or "patch_embed" in last else "other"), False
        if _EMBEDDING.search(last):
            return "embedding", False
        return ("norm", False) if _NORM.search(last) else ("linear", any_turned and (shape[0] == shape[1] or is_turned(name)))

    return role


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names in a config.json."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json that holds several."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
