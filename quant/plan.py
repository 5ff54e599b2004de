"""From a checkpoint and a scheme to the quantised checkpoint, and back: every tensor accounted for, nothing read yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.checkpoint.spec import check_patterns, matches
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.model import ModelMap, adapter_reason, describe, quantized_reason

from . import FORMATS, QUANTIZERS, Scheme, decode, read_config
from . import dequantize as values_of
from .calibrated import Calibration, calibration_problem, steps_for
from .layer import Layer, Method, Rows

PACKED = ".weight_packed"


def problems(
    bits: int, group_size: int, symmetric: bool, method: str, format_name: str, options: Mapping[str, object], calibrated: bool = False
) -> list[str]:
    """Everything wrong with these options, a sentence each; `calibrated`: a calibration is given."""
    found: list[str] = []
    try:
        Scheme(bits, group_size, symmetric)
    except OptionError as error:
        found.append(str(error))
    for registry, name in ((QUANTIZERS, method), (FORMATS, format_name)):
        if name not in list(registry):
            found.append(f"unknown {registry.kind} '{name}'.{nearest(name, registry)}")
    if method not in list(QUANTIZERS):
        return found
    if wrong := calibration_problem(QUANTIZERS[method], calibrated):
        found.append(wrong)
    return found + QUANTIZERS[method].options.problems(options)


def quantize(
    checkpoint: Checkpoint,
    scheme: Scheme | Mapping[str, Scheme],
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
    _check_fit(checkpoint, chosen)
    _check_fused(roles, chosen, kept)

    made = Method(checkpoint.label, quantizer, arguments, layout, allow_nonfinite)
    steps: list[Step] = []
    layers: list[Layer] = []
    for name, spec in checkpoint.specs.items():
        if name not in kept:
            continue
        if name not in chosen:
            steps.append(copy_step(checkpoint, name))
            continue
        own, fixed = chosen[name], layout.fixed(spec)
        prefix = name.removesuffix("weight")
        writes = layout.specs(spec, own)
        layers.append(Layer(name, spec, own, tuple(write for write in writes if write.name.removeprefix(prefix) not in fixed), made))
        steps += [_constant(write, fixed[write.name.removeprefix(prefix)]) for write in writes if write not in layers[-1].writes]
    if calibration is not None:
        calibrated, unseen = steps_for(checkpoint, roles, layers, calibration, device)
        steps, notes = steps + calibrated, notes + unseen
    else:
        steps += [Step(((checkpoint, layer.name),), layer.writes, Rows(layer, device), layout.row_unit(layer.scheme)) for layer in layers]
    schemes = list(dict.fromkeys(chosen.values()))
    what = str(schemes[0]) if len(schemes) == 1 else f"{len(schemes)} schemes"
    result = Checkpoint(f"{checkpoint.label} in {what}", Plan(steps), checkpoint.files, (*checkpoint.notes, *notes))
    config = layout.config({roles.tensors[name].module: own for name, own in chosen.items()}, _dense_modules(checkpoint, roles, chosen, kept))
    if config is None:
        return result
    if not result.config:  # a bare file: the packed tensors cannot be read without knowing how they were packed
        result = replace(result, files={"config.json": b"{}"})
    return result.with_config(quantization_config=config)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether `dequantize` has something to do."""
    return any(name.endswith(PACKED) for name in checkpoint.specs)


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """The dense checkpoint that a packed one (compressed-tensors `pack-quantized`, ours or another's) stands for, in the dtype of its scales.

    Errors: CheckpointError where nothing is packed, or in a way that cannot be read.
    """
    if not is_packed(checkpoint):
        raise CheckpointError(f"{checkpoint.label} holds no packed weights (…{PACKED}); there is nothing to dequantize")
    scheme_of = read_config(checkpoint.config)
    steps: list[Step] = []
    done: set[str] = set()
    for name in checkpoint.specs:
        if not name.endswith(PACKED):
            continue
        module = name.removesuffix(PACKED)
        scheme = scheme_of(module)
        parts = [part for part in ("weight_packed", "weight_scale", "weight_zero_point") if f"{module}.{part}" in checkpoint.specs]
        if scheme is None or "weight_scale" not in parts or f"{module}.weight_shape" not in checkpoint.specs:
            raise CheckpointError(f"{checkpoint.label}: {module} is packed, but its scheme in config.json, its scale or its shape is missing")
        shape = tuple(int(length) for length in checkpoint.read(f"{module}.weight_shape"))
        reads = tuple((checkpoint, f"{module}.{part}") for part in parts)
        spec = TensorSpec(f"{module}.weight", checkpoint.specs[f"{module}.weight_scale"].dtype, shape)
        steps.append(Step(reads, (spec,), _Unpack(tuple(parts), scheme, shape[1]), FORMATS["pack-quantized"].row_unit(scheme)))
        done |= {f"{module}.{part}" for part in (*parts, "weight_shape")}
    steps += [copy_step(checkpoint, name) for name in checkpoint.specs if name not in done]
    result = Checkpoint(f"{checkpoint.label}, dequantized", Plan(steps), checkpoint.files, checkpoint.notes)
    return result.with_config(quantization_config=None)


class _Unpack:
    """Decode rows of one weight."""

    def __init__(self, parts: tuple[str, ...], scheme: Scheme, width: int) -> None:
        self.parts, self.scheme, self.width = parts, scheme, width

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        named = dict(zip(self.parts, tensors, strict=True))
        return [values_of(decode(named, self.scheme, (len(tensors[0]), self.width)))]


def _constant(spec: TensorSpec, value: Tensor) -> Step:
    return Step((), (spec,), lambda tensors, first_row, measured: (value,))


def _choose(
    checkpoint: Checkpoint, roles: ModelMap, scheme: Scheme | Mapping[str, Scheme], exclude: Sequence[str], kept: Collection[str]
) -> tuple[dict[str, Scheme], list[str]]:
    """The schemes of the weights to quantise, and a note for linear layers that stay as they are."""
    check_patterns("--exclude", exclude, checkpoint.specs)
    wanted = [name for name in roles.linears if name in kept and not matches(name, exclude)]
    if not isinstance(scheme, Scheme):
        modules = [roles.tensors[name].module for name in roles.linears]
        if unknown := next((module for module in scheme if module not in modules), None):
            raise OptionError(f"{checkpoint.label} has no linear layer '{unknown}' to quantize.{nearest(unknown, modules)}")
        wanted = [name for name in wanted if roles.tensors[name].module in scheme]
    turned = [name for name in wanted if roles.tensors[name].transposed]
    notes = [*roles.notes] + ([f"{len(turned)} layers store their weights [in, out] ('{turned[0]}') and stay as they are"] if turned else [])
    chosen = [name for name in wanted if name not in turned and checkpoint.specs[name].is_float]
    if not chosen:
        reason = "; ".join(["no matrix named *.weight that is one", *notes])
        raise CheckpointError(f"{checkpoint.label} has no linear layer to quantize: {reason}")
    return {name: scheme if isinstance(scheme, Scheme) else scheme[roles.tensors[name].module] for name in chosen}, notes


def _check_fit(checkpoint: Checkpoint, chosen: Mapping[str, Scheme]) -> None:
    misfits = {name: reason for name, scheme in chosen.items() if (reason := scheme.fits(checkpoint.specs[name].shape))}
    if not misfits:
        return
    name = min(misfits)
    uniform = len(set(chosen.values())) == 1

    def fits_all(size: int) -> bool:
        return uniform and all(replace(scheme, group_size=size).fits(checkpoint.specs[name].shape) is None for name, scheme in chosen.items())

    size = next((size for size in (128, 64, 32, 16, 0) if fits_all(size)), None)
    advice = "" if size is None else f"--group-size {size} fits all layers" if size else "--group-size 0 (one scale a row) fits all"
    advice = advice or ("" if uniform else "give it another scheme")
    advice += f"{', or ' if advice else ''}leave layers out with --exclude"
    others = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    raise CheckpointError(f"{checkpoint.label}: {name} {misfits[name].partition(';')[0]}{others}; {advice}")


def _check_fused(roles: ModelMap, chosen: Mapping[str, Scheme], kept: Collection[str]) -> None:
    for group in roles.fused:
        inside = [name for name in group if name in chosen]
        outside = next((name for name in group if name in kept and name not in chosen), None)
        if inside and outside:
            raise OptionError(f"servers fuse {inside[0]} and {outside}: quantize both or neither (--exclude)")
        if other := next((name for name in inside if chosen[name] != chosen[inside[0]]), None):
            raise OptionError(f"servers fuse {inside[0]} and {other}: give both one scheme, not {chosen[inside[0]]} and {chosen[other]}")


def _dense_modules(checkpoint: Checkpoint, roles: ModelMap, chosen: Collection[str], kept: Collection[str]) -> list[str]:
    """Modules that are, or may be, linear layers and are not quantised; tied heads, which have no tensor of their own, among them."""
    tied = [name for group in roles.tied for name in group if name not in checkpoint.specs]
    rest = {name: meaning for name, meaning in roles.tensors.items() if name in kept and name not in chosen}
    dense = [
        name
        for name, meaning in rest.items()
        if name.endswith(".weight") and len(checkpoint.specs[name].shape) == 2 and meaning.role in ("linear", "head", "other")
    ]
    return [name.removesuffix(".weight") for name in (*dense, *tied)]
