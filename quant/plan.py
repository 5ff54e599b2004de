"""From a checkpoint and a scheme to the quantised checkpoint, and back: every tensor accounted for, nothing read yet."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.checkpoint.scan import Measured, Scan
from mergekit_plus.checkpoint.spec import check_patterns, matches
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.model import FUSED, ModelMap, adapter_reason, describe, quantized_reason

from . import FORMATS, QUANTIZERS, Scheme
from .calibrated import Calibration, calibration_problem, steps_for, tuned_parameters
from .floats import FP8, FP8_BLOCK, MXFP4, NVFP4, FloatScheme, global_scale
from .formats import AnyScheme, Format, Module, holds_codes, modules_of
from .formats.fp4 import GLOBAL
from .layer import Layer, Method, Rows
from .validate import refuse

PRESETS: dict[str, tuple[AnyScheme, str]] = {  # what is asked for by one name: the scheme, and the format that stores it
    "W8A8": (Scheme(8, 0), "int-quantized"), "FP8": (FP8, "float-quantized"), "FP8_BLOCK": (FP8_BLOCK, "float-quantized"),
    "NVFP4": (NVFP4, "nvfp4-pack-quantized"), "MXFP4": (MXFP4, "mxfp4-pack-quantized"),
}  # fmt: skip
SECOND_CONFIGS = ("quantize_config.json", "quant_config.json")  # which say again what config.json says


def problems(
    bits: int, group_size: int, symmetric: bool, method: str, format_name: str, options: Mapping[str, object], calibrated: bool = False
) -> list[str]:
    """Everything wrong with these options, a sentence each; `calibrated`: a calibration is given."""
    try:
        scheme = Scheme(bits, group_size, symmetric)
    except OptionError as error:
        return [str(error), *_problems(None, method, format_name, options, calibrated)]
    return _problems(scheme, method, format_name, options, calibrated)


def preset_problems(name: str, method: str, format_name: str | None, options: Mapping[str, object], calibrated: bool = False) -> list[str]:
    """Everything wrong with a scheme asked for by its name, and with the options beside it; the format is the scheme's own where none is named."""
    if name not in PRESETS:
        return [f"unknown scheme '{name}'.{nearest(name, PRESETS)}", *_problems(None, method, format_name or "dense", options, calibrated)]
    scheme, own = PRESETS[name]
    return _problems(scheme, method, format_name or own, options, calibrated)


def _problems(scheme: AnyScheme | None, method: str, format_name: str, options: Mapping[str, object], calibrated: bool) -> list[str]:
    found: list[str] = []
    for registry, name in ((QUANTIZERS, method), (FORMATS, format_name)):
        if name not in registry:
            found.append(f"unknown {registry.kind} '{name}'.{nearest(name, registry)}")
    if scheme is not None and format_name in FORMATS and (reason := FORMATS[format_name].refuses(scheme)):
        found.append(f"format {format_name}: {reason}")
    if isinstance(scheme, FloatScheme) and (method != "rtn" or options):
        found.append(f"{scheme} is rounded to the nearest number; method {method}{f' and its option {next(iter(options))}' if options else ''} is for integers")
    if method not in QUANTIZERS:
        return found
    if wrong := calibration_problem(QUANTIZERS[method], calibrated):
        found.append(wrong)
    return found + QUANTIZERS[method].options.problems(options)


def quantize(
    checkpoint: Checkpoint,
    scheme: AnyScheme | Mapping[str, AnyScheme],
    method: str = "rtn",
    options: Mapping[str, object] | None = None,
    format_name: str = "pack-quantized",
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    device: str = "cpu",
    allow_nonfinite: bool = False,
    calibration: Calibration | None = None,
) -> Checkpoint:
    """The checkpoint with the weights of its linear layers quantised; heads, embeddings, norms and what `exclude` matches stay as they are,
    and what `include` does not match is left out. `scheme` may be a table of schemes by the names of modules ("model.layers.3.mlp.up_proj"); layers
    that it does not name stay as they are. A calibrated method learns from `calibration`; layers outside of the blocks are rounded to nearest then.

    Errors: OptionError for impossible options, a module that is no linear layer, and layers that servers fuse with different schemes, or some
    with none; CheckpointError where the checkpoint is quantised already, or a layer does not fit its scheme.
    """
    quantizer, layout = QUANTIZERS[method], FORMATS[format_name]
    arguments = quantizer.options.check(options or {})
    if found := calibration_problem(quantizer, calibration is not None):
        raise OptionError(found)
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    roles = describe(checkpoint)
    check_patterns("--include", include, checkpoint.specs)
    kept = {name for name in checkpoint.specs if not include or matches(name, include)}
    chosen, notes = _choose(checkpoint, roles, scheme, exclude, kept)
    _check_held(layout, method, chosen)
    _check_fit(checkpoint, chosen)
    _check_fused(roles, chosen, kept)
    ranges = _ranges(checkpoint, [name for name, own in chosen.items() if own == NVFP4])

    free = [name for name in checkpoint.specs if name in kept and not matches(name, exclude)]
    tuned = tuned_parameters(checkpoint, roles, chosen, free, calibration)
    made = Method(checkpoint.label, quantizer, arguments, layout, allow_nonfinite)
    steps: list[Step] = []
    layers: list[Layer] = []
    for name, spec in checkpoint.specs.items():
        if name not in kept:
            continue
        if name not in chosen:
            steps += [copy_step(checkpoint, name)] if name not in tuned else []
            continue
        own, fixed = chosen[name], layout.fixed(spec)
        prefix = name.removesuffix("weight")
        writes = layout.specs(spec, own)
        layers.append(Layer(name, spec, own, tuple(write for write in writes if write.name.removeprefix(prefix) not in (*fixed, GLOBAL)), made))
        steps += [constant(write, fixed[part]) for write in writes if (part := write.name.removeprefix(prefix)) in fixed]
        steps += [Step((), (write,), _global_scale, measured=ranges[name]) for write in writes if write.name == f"{prefix}{GLOBAL}"]
    if calibration is not None:
        calibrated, unseen = steps_for(checkpoint, roles, layers, tuned, calibration, device)
        steps, notes = steps + calibrated, notes + unseen
    else:
        for layer in layers:
            steps.append(Step(((checkpoint, layer.name),), layer.writes, Rows(layer, device), layout.row_unit(layer.scheme), ranges.get(layer.name)))
    schemes = list(dict.fromkeys(chosen.values()))
    what = str(schemes[0]) if len(schemes) == 1 else f"{len(schemes)} schemes"
    result = Checkpoint(f"{checkpoint.label} in {what}", Plan(steps), checkpoint.files, (*checkpoint.notes, *notes))
    config = layout.config({roles.tensors[name].module: own for name, own in chosen.items()}, dense_modules(checkpoint, roles, chosen, kept))
    return refuse(with_quantization(result, layout, config))


def with_quantization(result: Checkpoint, layout: Format, config: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint whose config.json says how it is quantised, and no other file says otherwise."""
    result = replace(result, files={name: content for name, content in result.files.items() if name not in SECOND_CONFIGS})
    if config is None:
        return result.with_config(quantization_config=None, compression_config=None)
    if not result.config:  # a bare file: the packed tensors cannot be read without knowing how they were packed
        result = replace(result, files={**result.files, "config.json": b"{}"})
    result = result.with_config(quantization_config=config, compression_config=None)
    return replace(result, files={**result.files, layout.copy: json.dumps(config, indent=2).encode() + b"\n"}) if layout.copy else result


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether `dequantize` has something to do."""
    return any(holds_codes(checkpoint, name) for name in checkpoint.specs)


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """The dense checkpoint that a packed one, ours or another's, stands for, in the dtype of its scales (bfloat16 for FP4).

    Errors: CheckpointError where nothing is packed, or in a way that cannot be read.
    """
    if not is_packed(checkpoint):
        raise CheckpointError(f"{checkpoint.label} holds no packed weights (….weight_packed, ….qweight); there is nothing to dequantize")
    steps: list[Step] = []
    done: set[str] = set()
    for module in modules_of(checkpoint):
        reads = tuple((checkpoint, f"{module.name}.{part}") for part in module.row_parts)
        spec = TensorSpec(f"{module.name}.weight", module.reader.dtype or module.specs[module.scale].dtype, module.shape)
        steps.append(Step(reads, (spec,), _Unpack(checkpoint.label, module), module.reader.row_unit(module.stored.scheme)))
        done.update(module.tensors)
    steps += [copy_step(checkpoint, name) for name in checkpoint.specs if name not in done]
    return with_quantization(Checkpoint(f"{checkpoint.label}, dequantized", Plan(steps), checkpoint.files, checkpoint.notes), FORMATS["dense"], None)


def _global_scale(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
    return (measured,)


class _Unpack:
    """Decode rows of one weight."""

    def __init__(self, label: str, module: Module) -> None:
        self.label, self.module = label, module

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        try:
            return [self.module.values(dict(zip(self.module.row_parts, tensors, strict=True)))]
        except CheckpointError as error:
            raise CheckpointError(f"{self.label}: {self.module.name}: {error}") from None


def constant(spec: TensorSpec, value: Tensor) -> Step:
    """A step that writes this."""
    return Step((), (spec,), lambda tensors, first_row, measured: (value,))


def _choose(
    checkpoint: Checkpoint, roles: ModelMap, scheme: AnyScheme | Mapping[str, AnyScheme], exclude: Sequence[str], kept: Collection[str]
) -> tuple[dict[str, AnyScheme], list[str]]:
    """The schemes of the weights to quantise, and a note for linear layers that stay as they are."""
    check_patterns("--exclude", exclude, checkpoint.specs)
    wanted = [name for name in roles.linears if name in kept and not matches(name, exclude)]
    if isinstance(scheme, Mapping):
        modules = dict.fromkeys(roles.tensors[name].module for name in roles.linears)
        if unknown := next((module for module in scheme if module not in modules), None):
            raise OptionError(f"{checkpoint.label} has no linear layer '{unknown}' to quantize.{nearest(unknown, modules)}")
        wanted = [name for name in wanted if roles.tensors[name].module in scheme]
    turned = [name for name in wanted if roles.tensors[name].transposed]
    notes = [*roles.notes] + ([f"{len(turned)} layers store their weights [in, out] ('{turned[0]}') and stay as they are"] if turned else [])
    chosen = [name for name in wanted if name not in turned and checkpoint.specs[name].is_float]
    if not chosen:
        reason = "; ".join(["no matrix named *.weight that is one", *notes])
        raise CheckpointError(f"{checkpoint.label} has no linear layer to quantize: {reason}")
    return {name: scheme[roles.tensors[name].module] if isinstance(scheme, Mapping) else scheme for name in chosen}, notes


def _check_held(layout: Format, method: str, chosen: Mapping[str, AnyScheme]) -> None:
    for scheme in dict.fromkeys(chosen.values()):
        if reason := layout.refuses(scheme):
            raise OptionError(f"format {layout.name}: {reason}")
        if isinstance(scheme, FloatScheme) and method != "rtn":
            raise OptionError(f"{scheme} is rounded to the nearest number; method {method} is for integers")


def _ranges(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Measured]:
    """The global scale of each of these weights: one for those that servers fuse, of the largest magnitude in all of them."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        groups.setdefault((parent, next((siblings for siblings in FUSED if leaf in siblings), (leaf,))), []).append(name)

    def measure(scan: Scan) -> Tensor:
        return global_scale(max(scan.map(lambda tensors: float(tensors[0].abs().max()))))

    found: dict[str, Measured] = {}
    for group in groups.values():
        measured = Measured(measure, f"{NVFP4}: measuring", whole_model=True)
        measured.steps = [copy_step(checkpoint, name) for name in group]
        found |= dict.fromkeys(group, measured)
    return found


def _check_fit(checkpoint: Checkpoint, chosen: Mapping[str, AnyScheme]) -> None:
    misfits = {name: reason for name, scheme in chosen.items() if (reason := scheme.fits(checkpoint.specs[name].shape))}
    if not misfits:
        return
    name = min(misfits)
    schemes = set(chosen.values())
    only = schemes.pop() if len(schemes) == 1 else None

    def fits_all(size: int) -> bool:
        return isinstance(only, Scheme) and all(replace(only, group_size=size).fits(checkpoint.specs[name].shape) is None for name in chosen)

    size = next((size for size in (128, 64, 32, 16, 0) if fits_all(size)), None)
    advice = "" if size is None else f"--group-size {size} fits all layers" if size else "--group-size 0 (one scale a row) fits all"
    advice = advice or ("" if only else "give it another scheme")
    advice += f"{', or ' if advice else ''}leave layers out with --exclude"
    others = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    raise CheckpointError(f"{checkpoint.label}: {name} {misfits[name].partition(';')[0]}{others}; {advice}")


def _check_fused(roles: ModelMap, chosen: Mapping[str, AnyScheme], kept: Collection[str]) -> None:
    for group in roles.fused:
        inside = [name for name in group if name in chosen]
        outside = next((name for name in group if name in kept and name not in chosen), None)
        if inside and outside:
            raise OptionError(f"servers fuse {inside[0]} and {outside}: quantize both or neither (--exclude)")
        if other := next((name for name in inside if chosen[name] != chosen[inside[0]]), None):
            raise OptionError(f"servers fuse {inside[0]} and {other}: give both one scheme, not {chosen[inside[0]]} and {chosen[other]}")


def dense_modules(checkpoint: Checkpoint, roles: ModelMap, chosen: Collection[str], kept: Collection[str]) -> list[str]:
    """Modules that are, or may be, linear layers and are not quantised; tied heads, which have no tensor of their own, among them."""
    tied = [name for group in roles.tied for name in group if name not in checkpoint.specs]
    rest = {name: meaning for name, meaning in roles.tensors.items() if name in kept and name not in chosen}
    dense = [
        name
        for name, meaning in rest.items()
        if name.endswith(".weight") and len(checkpoint.specs[name].shape) == 2 and meaning.role in ("linear", "head", "other")
    ]
    return [name.removesuffix(".weight") for name in (*dense, *tied)]
