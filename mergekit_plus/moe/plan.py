"""From dense models to a mixture as a plan: the base's tensors under their names, every expert's MLPs under new ones, and the routers.

Two layouts, as they are published: Mixtral (`block_sparse_moe.experts.0.w1`) and Qwen2-MoE (`mlp.experts.0.gate_proj`, with a shared expert).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Measured, Plan, Step, TensorSpec, copy_step
from ..checkpoint.dtypes import TORCH_DTYPES, config_dtype, parse_float_dtype
from ..checkpoint.plan import row_multiple
from ..checkpoint.spec import natural_order
from ..errors import CheckpointError, OptionError
from ..model import architecture, quantized_reason
from .config import Expert, MoeConfig
from .router import EMBEDDING, gates

FAMILIES = {"mixtral": ("llama", "mistral"), "qwen": ("llama", "mistral", "qwen2")}
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_KEPT = re.compile(
    r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm)\.weight"
)
_QKV_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # in checkpoints of old; computed from the config
_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}


def moe(inputs: Mapping[str, Checkpoint], config: MoeConfig) -> Checkpoint:
    """The mixture of these models, computed as it is read; the prompts are read by the base model when the first router is.

    Errors: OptionError for impossible options; CheckpointError for models that cannot be experts of one mixture, with all reasons.
    """
    if found := list(config.conflicts()):
        raise OptionError(f"moe: {'; '.join(found)}")
    base = inputs[config.base_model]
    if found := [problem for name in config.models for problem in _misfits(inputs[name], base, config)]:
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        raise CheckpointError(f"these models cannot be experts of one {config.layout.title()} mixture: {'; '.join(found[:4])}{more}")
    dtype = parse_float_dtype(config.dtype) if config.dtype else None
    steps = [*_of_base(base, config, dtype), *_experts(inputs, config, dtype), *_routers(base, config, dtype)]
    steps.sort(key=lambda step: natural_order(step.writes[0].name))
    label = f"{config.layout} of {', '.join(inputs[expert.source_model].label for expert in config.all_experts)}"
    files = {**base.files, "config.json": json.dumps(_config(base, config, dtype), indent=2).encode() + b"\n"}
    return Checkpoint(label, Plan(steps), files)


def _misfits(model: Checkpoint, base: Checkpoint, config: MoeConfig) -> Iterator[str]:
    """Why a model cannot take part; the base itself is one of them."""
    kind, wanted = model.config.get("model_type"), FAMILIES[config.layout]
    if reason := quantized_reason(model):
        yield reason
        return
    if kind not in wanted:
        yield f"{model.label} is of type {kind!r}, which is none of {', '.join(wanted)}"
        return
    if kind != base.config.get("model_type"):
        yield f"{model.label} is of type {kind!r}, {base.label} of type {base.config.get('model_type')!r}"
    if model.config.get("hidden_act", "silu") != base.config.get("hidden_act", "silu"):
        yield f"{model.label} has the activation {model.config['hidden_act']!r}, {base.label} another"
    for name in model.specs:
        known = _MLP.fullmatch(name) or _KEPT.fullmatch(name) or _BUFFER.fullmatch(name) or (kind == "qwen2" and _QKV_BIAS.fullmatch(name))
        if not known:
            yield f"{model.label} has '{name}', which the mixture has no place for"
    ours, theirs = ({name: part.specs[name].shape for name in part.specs if _MLP.fullmatch(name)} for part in (base, model))
    if not ours:
        yield f"{base.label} has no MLPs"
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {base.label} has {ours.get(name, 'none')}, {model.label} {theirs.get(name, 'none')}"


def _of_base(base: Checkpoint, config: MoeConfig, dtype: str | None) -> Iterator[Step]:
    """Everything but the MLPs. Qwen2-MoE's q, k and v have biases; those that the base lacks are zeros."""
    for name, spec in base.specs.items():
        if not _MLP.fullmatch(name) and not _BUFFER.fullmatch(name):
            yield _changed(base, name, name, dtype)
        bias = re.sub(r"weight$", "bias", name)
        if config.layout == "qwen" and _QKV_BIAS.fullmatch(bias) and bias not in base.specs:
            zeros = torch.zeros(spec.rows, dtype=TORCH_DTYPES[dtype or spec.dtype])
            yield copy_step(Checkpoint.from_tensors({bias: zeros}, "zeros"), bias)


def _experts(inputs: Mapping[str, Checkpoint], config: MoeConfig, dtype: str | None) -> Iterator[Step]:
    base = inputs[config.base_model]
    for name in base.specs:
        if place := _MLP.fullmatch(name):
            for number, expert in enumerate(config.all_experts):
                shared = number >= len(config.experts)
                to = _expert_name(config.layout, place[1], place[2], None if shared else number)
                function = _worked(expert, config.seed, to, is_residual=place[2] == "down")
                yield _changed(inputs[expert.source_model], name, to, dtype or base.specs[name].dtype, function, whole=expert.noise_scale is not None)


def _expert_name(layout: str, layer: str, part: str, number: int | None) -> str:
    if layout == "mixtral":
        return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{_MIXTRAL[part]}.weight"
    return f"model.layers.{layer}.mlp.{'shared_expert' if number is None else f'experts.{number}'}.{part}_proj.weight"


def _worked(expert: Expert, seed: int, name: str, is_residual: bool) -> Callable[[Tensor], Tensor] | None:
    """What is done to a weight of an expert, in float32; None for nothing. The noise depends on the seed and the tensor's new name."""
    scale = expert.residual_scale if is_residual else None
    if expert.noise_scale is None and scale is None:
        return None

    def work(weight: Tensor) -> Tensor:
        result = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if expert.noise_scale is not None:
            state = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)
            result = result + expert.noise_scale * torch.randn(result.shape, generator=torch.Generator().manual_seed(state), dtype=result.dtype)
        return result if scale is None else result * scale

    return work


def _changed(
    part: Checkpoint, name: str, to: str, dtype: str | None, function: Callable[[Tensor], Tensor] | None = None, whole: bool = False
) -> Step:
    """A tensor under another name, through a function, in another dtype; a mere copy where nothing changes. `whole`: not row by row."""
    spec = part.specs[name]
    if function is None and dtype in (None, spec.dtype):
        return copy_step(part, name, to)
    written = replace(spec, name=to, dtype=dtype or spec.dtype)

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return ((function(tensors[0]) if function else tensors[0]).to(TORCH_DTYPES[written.dtype]),)

    return Step(((part, name),), (written,), run, 0 if whole else row_multiple(spec))


def _routers(base: Checkpoint, config: MoeConfig, dtype: str | None) -> Iterator[Step]:
    """The gate of each layer, and those of a shared expert; all from one look at the prompts."""
    layers = 1 + max(int(place[1]) for place in map(_MLP.fullmatch, base.specs) if place)
    shared, tag = len(config.experts), dtype or base.specs[EMBEDDING].dtype

    def measure(scan: object) -> Tensor:
        return gates(base, config.all_experts, config.gate_mode, layers, config.seed)

    rows = Measured(measure, "moe: reading the prompts", whole_model=True)
    for layer in range(layers):
        if config.layout == "mixtral":
            yield _router(f"model.layers.{layer}.block_sparse_moe.gate.weight", layer, slice(0, shared), rows, tag, base)
        else:
            yield _router(f"model.layers.{layer}.mlp.gate.weight", layer, slice(0, shared), rows, tag, base)
            yield _router(f"model.layers.{layer}.mlp.shared_expert_gate.weight", layer, slice(shared, shared + 1), rows, tag, base)


def _router(name: str, layer: int, experts: slice, rows: Measured, tag: str, base: Checkpoint) -> Step:
    written = TensorSpec(name, tag, (experts.stop - experts.start, base.specs[EMBEDDING].shape[1]))

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (measured[layer, experts].to(TORCH_DTYPES[tag]),)

    return Step((), (written,), run, 0, rows)


def _config(base: Checkpoint, config: MoeConfig, dtype: str | None) -> dict[str, Any]:
    """The base's config.json as one of the mixture's: what the base's family takes for granted is said, since the mixture's takes other things so."""
    dense = json.loads(architecture(base)[1].to_json_string(use_diff=False))
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "auto_map", "_name_or_path", "transformers_version")
    result = {key: value for key, value in {**dense, **base.config}.items() if key not in dropped}
    experts = {"num_experts_per_tok": config.experts_per_token, "output_router_logits": False}
    if config.layout == "mixtral":
        result |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": len(config.experts), **experts}
        result.setdefault("sliding_window", None)
    else:
        width = result["intermediate_size"]
        result |= {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": len(config.experts), **experts}
        result |= {"moe_intermediate_size": width, "shared_expert_intermediate_size": width, "norm_topk_prob": True}
        result |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": True}
        if "use_sliding_window" not in result:  # Mistral's window holds for all layers; this layout has none of that kind
            window = result.get("sliding_window")
            if window and window < result["max_position_embeddings"]:
                raise CheckpointError(f"{base.label} has a sliding window of {window} tokens in all layers, which Qwen2-MoE cannot have; use no shared_experts")
            result |= {"use_sliding_window": False, "sliding_window": None}
    names = {key: config_dtype(dtype) for key in ("dtype", "torch_dtype") if dtype and key in result}
    return result | names
