"""What a checkpoint holds, as data, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from .checkpoint import Checkpoint
from .checkpoint.folder import ADAPTER_CONFIG, ADAPTER_QUANT, COMPACT, DELTA_QUANT
from .checkpoint.inputs import input_files
from .checkpoint.layout import file_inputs
from .checkpoint.spec import natural_order
from .evaluate import size
from .model import describe, quantized_reason


def inspect(checkpoint: Checkpoint, tensors: bool = False) -> dict[str, Any]:
    """Sizes, dtypes, roles, fused groups and tied names; with `tensors`, a list of every tensor."""
    specs = checkpoint.specs
    roles = describe(checkpoint)
    measured = size(checkpoint)
    dtypes: Counter[str] = Counter()
    for spec in specs.values():
        dtypes[spec.dtype] += spec.nbytes
    blocks = {tensor.block for tensor in roles.tensors.values() if tensor.block is not None}
    facts = {
        "label": checkpoint.label,
        "architecture": (checkpoint.config.get("architectures") or ["no config.json"])[0],
        "adapter": _adapter(checkpoint),
        "tensors": len(specs),
        "files": sum(blob.name.endswith(".safetensors") for blobs in input_files(checkpoint).values() for blob in blobs),
        "bytes": checkpoint.nbytes,
        "parameters": measured.parameters,
        "bits_per_weight": measured.bits_per_weight,
        "dtypes": dict(dtypes.most_common()),
        "roles": dict(Counter(tensor.role for tensor in roles.tensors.values()).most_common()),
        "blocks": len(blocks),
        "fused": sorted({" + ".join(name.rsplit(".", 2)[-2] for name in group[:8]) for group in roles.fused}),
        "tied": [list(names) for names in roles.tied],
        "quantized": quantized_reason(checkpoint),
        "packed": _packed(checkpoint),
        "compact": _compact(checkpoint),
    }
    if tensors:
        facts["list"] = [
            {"name": name, "dtype": specs[name].dtype, "shape": specs[name].shape, "role": roles.tensors[name].role}
            for name in sorted(specs, key=natural_order)
        ]
    return facts


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint where it lies, or would lie: of what is expanded as it is read, those that it is expanded from."""
    kept = _packed(checkpoint) or _compact(checkpoint)
    return kept["bytes"] if kept else checkpoint.nbytes


def _adapter(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What kind of adapter it is, of which base; the ranks that its modules have."""
    if ADAPTER_CONFIG not in checkpoint.files:
        return None
    config = checkpoint.json_file(ADAPTER_CONFIG)
    ranks = [spec.shape[0] for name, spec in checkpoint.specs.items() if name.endswith((".lora_A.weight", ".lora_embedding_A")) and spec.shape]
    kind = "DoRA" if config.get("use_dora") else str(config.get("peft_type"))
    return {"type": kind, "base": config.get("base_model_name_or_path") or "an unnamed base", "modules": len(ranks), "ranks": sorted(set(ranks))}


def _packed(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How an adapter or a difference lies on the disk, where it is packed; a model with one applied is not."""
    return packed_facts(checkpoint) if {ADAPTER_CONFIG, DELTA_QUANT} & checkpoint.files.keys() else None


def packed_facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How what was opened lies on the disk, where it is expanded from a few bits: `bits` is the average where rows have widths of their own."""
    for part, source in file_inputs(checkpoint):
        for sidecar in (ADAPTER_QUANT, DELTA_QUANT):
            if said := part.json_file(sidecar):
                stored = sum({blob.place: blob.size for blob, _ in source.places.values()}.values())
                return {"bytes": stored, "bits": _bits(said), "codebook": said["codebook"], "scale": said["scale"]}
    return None


def _bits(said: Mapping[str, Any]) -> float:
    """The bits of a number, as a sidecar says them."""
    elements = bits = 0
    for facts in said["tensors"].values():
        rows, own = facts["shape"][facts.get("axis", 0)], facts.get("bits", said["bits"])
        elements += prod(facts["shape"])
        bits += prod(facts["shape"]) // max(1, rows) * (sum(own) if isinstance(own, list) else own * rows)
    return said["bits"] if bits == elements * said["bits"] else bits / elements


def _compact(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How what was opened lies on the disk, where it is expanded from a folded model that stores what blocks share once."""
    parts = [part for part, _ in file_inputs(checkpoint)]
    if len(parts) != 1 or (part := parts[0]).config.get("model_type") != COMPACT:
        return None
    said = part.config["compact"]
    rank = max((rank for ranks in said.get("ranks", {}).values() for rank in ranks), default=0)
    return {"bytes": part.nbytes, "parameters": size(part).parameters, "groups": said["groups"], "rank": rank}
