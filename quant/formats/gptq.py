"""`gptq` (version 1) and `gptq_v2`, as AutoGPTQ and GPTQModel store them: the tensors of one weight, turned.

    P.qweight  I32  [in*bits/32, out]      unsigned codes, a dense stream of bits down the inputs: `weight_packed` turned
    P.qzeros   I32  [groups, out*bits/32]  unsigned zero points along the outputs; version 1 stores them less one
    P.scales   F16  [groups, out]
    P.g_idx    I32  [in]                   the group of each input

Version 1 cannot hold a zero point of 0: writers and readers do not agree on what 0 - 1 is (AutoGPTQ's kernels mask each field; GPTQModel subtracts
from and adds to whole words, so that it borrows from the neighbour). So it is written for symmetric codes only, whose zero point is 2^(bits-1),
and read as GPTQModel reads it. 5, 6 and 7 bits have another layout in GPTQModel and are neither written nor read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec
from mergekit_plus.errors import CheckpointError, OptionError

from ..floats import FloatScheme
from ..quantized import Quantized, Scheme, dequantize
from .bits import pack, unpack, words
from .config import Stored, disjoint_targets, unreadable
from .format import FORMATS, READERS, AnyScheme, Format, Reader
from .pack_quantized import prefix_of

WIDTHS = (2, 3, 4, 8)
GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel has kernels for
CONFIG = "quantize_config.json"
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # vLLM before 2026 looks the fused names up


def specs(weight: TensorSpec, scheme: Scheme, layout: str) -> tuple[TensorSpec, ...]:
    """The tensors that take the place of `P.weight`.

    Errors: OptionError as `prefix_of`, and for a shape that fills no whole words.
    """
    prefix, (out, width) = prefix_of(weight, scheme, layout), weight.shape
    unit = 32 // gcd(32, scheme.bits)  # codes that fill whole words
    if out % unit or width % unit:
        raise OptionError(f"{weight.name} is [{out}, {width}], and {layout} stores {unit} outputs and inputs at a time; leave it out with --exclude")
    groups = scheme.groups(width)
    return (
        TensorSpec(f"{prefix}qweight", "I32", (words(width, scheme.bits), out)),
        TensorSpec(f"{prefix}qzeros", "I32", (groups, words(out, scheme.bits))),
        TensorSpec(f"{prefix}scales", "F16", (groups, out)),
        TensorSpec(f"{prefix}g_idx", "I32", (width,)),
    )


def encode(quantized: Quantized, less: int) -> dict[str, Tensor]:
    """The four tensors of a whole weight; `less` is what zero points are stored less by."""
    codes, scale = quantized.codes, quantized.scale
    zeros = torch.zeros(scale.shape, dtype=torch.int8) if quantized.zero_point is None else quantized.zero_point
    group = codes.shape[1] // scale.shape[1]
    return {
        "qweight": pack(codes, quantized.bits).T.contiguous(),
        "qzeros": pack((zeros - less).T, quantized.bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group,
    }


def config(layers: Mapping[str, Scheme], ignore: Sequence[str], layout: str) -> dict[str, Any] | None:
    """The `quantization_config`: the scheme that most modules have, and under `dynamic` those of the others ("+:") and what is left dense ("-:").

    Modules outside of the blocks (heads) are dense without being named.
    """
    if not layers:
        return None
    main, _ = Counter(layers.values()).most_common(1)[0]
    named: dict[str, Scheme | str] = {}
    for module, scheme in layers.items():
        parent, _, leaf = module.rpartition(".")
        named |= {module: scheme} | ({f"{parent}.{_FUSED[leaf]}": scheme} if leaf in _FUSED else {})
    dense = [module for module in ignore if any(character.isdigit() for character in module)]
    targets = disjoint_targets({**named, **dict.fromkeys(dense, "dense")}, ())
    dynamic = {
        f"{'-' if scheme == 'dense' else '+'}:{_pattern(target)}": _entry(scheme) if isinstance(scheme, Scheme) else {}
        for scheme, found in targets.items() if scheme != main for target in found
    }  # fmt: skip
    return {
        "quant_method": "gptq", **_entry(main), "desc_act": False, "lm_head": False, "true_sequential": True, "static_groups": False,
        "checkpoint_format": layout, "format": layout, "pack_dtype": "int32", **({"dynamic": dynamic} if dynamic else {}),
    }  # fmt: skip


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def _pattern(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


def read_config(found: Mapping[str, Any]) -> Callable[[str], Stored | None]:
    """How a module is stored, from a `quantization_config` of quant_method "gptq".

    Errors: CheckpointError for what cannot be read.
    """
    layout = str(found.get("checkpoint_format") or found.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2") or found.get("pack_dtype", "int32") != "int32":
        raise unreadable(f"gptq in the format '{layout}', packed in {found.get('pack_dtype', 'int32')}")
    main = _stored(found, layout)
    rules = [
        (re.compile(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern), None if pattern[:2] == "-:" else _stored({**found, **own}, layout))
        for pattern, own in (found.get("dynamic") or {}).items()
    ]

    def lookup(module: str) -> Stored | None:
        return next((stored for rule, stored in rules if rule.match(module)), main)

    return lookup


def _stored(entry: Mapping[str, Any], layout: str) -> Stored:
    bits, size = entry.get("bits"), int(entry.get("group_size", 128))
    if bits not in WIDTHS:
        raise unreadable(f"gptq of {bits} bits")
    return Stored(layout, Scheme(bits, max(size, 0), bool(entry.get("sym", True))))


def zero_points(tensors: Mapping[str, Tensor], scheme: Scheme, out: int, less: int) -> Tensor:
    """The zero points in `qzeros`, int8 [out, groups], signed."""
    stored = tensors["qzeros"]
    if less and scheme.bits != 3:  # GPTQModel adds to whole words, which undoes what its subtraction borrowed
        ones = sum(1 << place for place in range(0, 32, scheme.bits))
        stored = stored + (ones - (1 << 32) if ones >> 31 else ones)
    zeros = unpack(stored, scheme.bits, out).T.contiguous()
    if less and scheme.bits == 3:
        zeros = (zeros - scheme.low + 1) % (1 << scheme.bits) + scheme.low
    return zeros


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: Sequence[int], less: int) -> Quantized:
    """The codes of a whole weight; the inverse of `encode`.

    Errors: CheckpointError for inputs in another order than that of their groups.
    """
    codes, order = _decode(tensors, scheme, shape, less)
    if order is not None:
        raise CheckpointError("its inputs are in the order of their activations (desc_act, `g_idx`), which no other format holds; dequantize it instead")
    return codes


def values(tensors: Mapping[str, Tensor], scheme: Scheme, shape: Sequence[int], less: int) -> Tensor:
    """The whole weight, whatever the order of its inputs."""
    codes, order = _decode(tensors, scheme, shape, less)
    return dequantize(codes) if order is None else dequantize(codes)[:, torch.argsort(order)].contiguous()


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: Sequence[int], less: int) -> tuple[Quantized, Tensor | None]:
    """The codes with the inputs of each group side by side, and where these inputs stand; None where they stand so."""
    out, width = shape
    codes = unpack(tensors["qweight"].T.contiguous(), scheme.bits, width)
    zeros = zero_points(tensors, scheme, out, less)
    if scheme.symmetric and bool(((zeros != 0) & (zeros != 2 * less - 1)).any()):  # the other version's, under a wrong name, is as clear
        raise CheckpointError(f"config.json says that it is symmetric, but its zero points (qzeros) are not all {-scheme.low}")
    scale, order = tensors["scales"].T.contiguous(), None
    if (index := tensors.get("g_idx")) is not None and not torch.equal(index.int(), torch.arange(width, dtype=torch.int32) // (width // scale.shape[1])):
        order, each = torch.argsort(index, stable=True), width // scale.shape[1]
        if not torch.equal(index[order], torch.arange(width, dtype=torch.int32) // each):
            raise CheckpointError(f"its groups (g_idx) do not have {each} inputs each")
        codes = codes[:, order].contiguous()
    return Quantized(codes, scale, None if scheme.symmetric else zeros, scheme.bits), order


def _refuses(layout: str, scheme: AnyScheme) -> str | None:
    if isinstance(scheme, FloatScheme) or scheme.bits not in WIDTHS:
        return f"it holds integers of 2, 3, 4 and 8 bits, not {scheme}"
    if scheme.group_size not in GROUPS:
        return f"its kernels know groups of {', '.join(map(str, GROUPS[1:]))} and whole rows, not of {scheme.group_size}"
    if layout == "gptq" and not scheme.symmetric:
        return "version 1 stores zero points less one, and cannot hold 0; write gptq_v2, or symmetric codes"
    return None


def _shape(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], scheme: Scheme) -> tuple[int, int]:
    rows, out = specs["qweight"].shape
    return out, rows * 32 // scheme.bits


for name, less, summary in (
    ("gptq", 1, "GPTQ, version 1: symmetric, for GPTQModel, vLLM and transformers with optimum"),
    ("gptq_v2", 0, "GPTQ, version 2: with any zero points, for GPTQModel"),
):
    FORMATS.register(
        name,
        Format(
            name, partial(specs, layout=name), partial(encode, less=less), lambda weight: {}, lambda scheme: 0, partial(config, layout=name), summary,
            partial(_refuses, name), torch.float16, CONFIG,
        ),
    )  # fmt: skip
    READERS.register(
        name,
        Reader(
            ("qweight", "qzeros", "scales", "g_idx"), partial(specs, layout=name), _shape, partial(decode, less=less), lambda scheme: 0, ("g_idx",),
            own_values=partial(values, less=less),
        ),
    )  # fmt: skip
