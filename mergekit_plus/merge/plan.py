"""From models and a method to the merged checkpoint: every tensor accounted for, nothing read yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Measured, Plan, Scan, Step, TensorSpec
from ..checkpoint.dtypes import TAGS, TORCH_DTYPES, config_dtype
from ..checkpoint.finite import is_finite, nonfinite
from ..checkpoint.plan import Run, copy_step
from ..checkpoint.spec import check_patterns, matches, natural_order
from ..errors import CheckpointError, OptionError, nearest
from ..layers import Position, positions
from ..model import adapter_reason, quantized_reason, tied_alias, vocabulary_size
from ..noise import Noise
from ..vocabulary.alignment import misalignment
from . import METHODS, MergeMethod, varying


@dataclass(frozen=True)
class MergeOptions:
    """What a merge needs beside its inputs and its method's own options."""

    dtype: str | None = None  # tag of the result; by default that of the inputs
    input_dtype: str | None = None  # tag to which inputs are rounded before the arithmetic (mergekit's `dtype`)
    exclude: tuple[str, ...] = ()  # shell patterns of tensors that are copied instead of merged
    include: tuple[str, ...] = ()  # shell patterns of the tensors that the result has; all where there are none
    seed: int = 0
    device: str = "cpu"
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor: `merged` ones with where each input has them, `copied` ones with the reason."""

    merged: dict[str, tuple[str, ...]]
    copied: dict[str, str]


OptionsOf = Callable[[str], Mapping[str, object]]  # the method's options for the tensor of this name


def merge(
    models: Sequence[Checkpoint],
    method: str,
    base: Checkpoint | None = None,
    options: Mapping[str, object] | OptionsOf | None = None,
    how: MergeOptions | None = None,
) -> Checkpoint:
    """The merge of these models, computed as it is read.

    options: the method's own, by name ("lambda", "density"); per-model ones take one value or one for each model, in the models' order, and
    numbers may vary by depth and by kind of layer (`merge.varying`). A function of the output tensor's name that gives them lets them vary
    in any way, except those by which a method measures the whole model.
    Errors: OptionError for an unknown method or impossible options; CheckpointError where the inputs do not fit together.
    """
    how = how or MergeOptions()
    chosen = METHODS[method]
    if _starts_at_first(chosen, len(models), base is not None):
        base, models = models[0], models[1:]
    if reason := _misfit(chosen, len(models), base is not None):
        raise OptionError(reason)
    inputs = ((base,) if chosen.takes_base and base is not None else ()) + tuple(models)
    donor = base or models[0]
    account_of = account(inputs, donor, how.exclude, how.include)
    if any(donor.specs[name].rows == vocabulary_size(donor) for name in account_of.merged if name in donor.specs) and (reason := misalignment(inputs)):
        raise CheckpointError(f"the models do not fit together: {reason}. Align them with --tokenizer union, base or a model (`tokenizer:` in a recipe)")

    if not callable(options) and varying.varies(options or {}):
        options = _by_position(chosen, options or {}, donor)
    bound_of = _binder(chosen, options or {}, len(models), how, len(inputs) > len(models))
    shared: Measured | None = None
    labels = [part.label for part in inputs]
    steps = []
    for name in sorted({*account_of.merged, *account_of.copied}, key=natural_order):
        if name in account_of.copied:
            steps.append(_copied(name, inputs, donor, how))
            continue
        reads = tuple(zip(inputs, account_of.merged[name], strict=True))
        spec = TensorSpec(name, _result_dtype([part.specs[read] for part, read in reads], how), donor_spec(reads).shape)
        bound = bound_of(name)
        if chosen.statistic and chosen.scope == "model" and shared is None:
            shared = Measured(bound.measure, f"{method}: measuring", whole_model=True, passes=chosen.passes)
        measured = shared or (Measured(bound.measure) if chosen.statistic else None)
        step = Step(reads, (spec,), bound.run(spec, labels), chosen.multiple(spec), measured)
        if measured is not None:
            measured.steps.append(step)
        steps.append(step)
    result = Checkpoint(f"{method} of {', '.join(model.label for model in models)}", Plan(steps), donor.files)
    split = any(place != name for name, places in account_of.merged.items() for place in places)
    return with_merged_config(result, inputs, split)


def problems(method: str, options: Mapping[str, object], models: int, base: bool) -> list[str]:
    """Everything wrong with a method, its options and this many models, a sentence each."""
    if method not in METHODS:
        return [f"unknown {METHODS.kind} '{method}'.{nearest(method, METHODS)}"]
    chosen = METHODS[method]
    reason = count_problem(method, models, base)
    if _starts_at_first(chosen, models, base):
        models -= 1
    if found := varying.problems(chosen, options):
        return [*([reason] if reason else []), *found]
    corners = varying.corners(options)
    found = [*([reason] if reason else []), *(problem for corner in corners for problem in chosen.options.problems(corner, models))]
    if not found and chosen.check is not None:
        for corner in corners:
            try:
                chosen.check(chosen.options.check(corner, models))
            except OptionError as error:
                found.append(str(error))
    return list(dict.fromkeys(found))


def count_problem(method: str, models: int, base: bool) -> str | None:
    """Why a method cannot merge this many models, with or without a base."""
    chosen = METHODS[method]
    return _misfit(chosen, models - 1, True) if _starts_at_first(chosen, models, base) else _misfit(chosen, models, base)


def account(inputs: Sequence[Checkpoint], donor: Checkpoint, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Account:
    """Decide for every tensor of the inputs what becomes of it; `donor` gives what is copied, and what `include` does not match is left out.

    Errors: CheckpointError naming tensors that only some inputs have, or whose shapes differ, and inputs that are quantised.
    """
    for part in inputs:
        if reason := quantized_reason(part) or adapter_reason(part):
            raise CheckpointError(reason)
    merged: dict[str, tuple[str, ...]] = {}
    copied: dict[str, str] = {}
    problems: list[str] = []
    vocabularies = False
    names = dict.fromkeys(name for part in inputs for name in part.specs)
    check_patterns("--exclude", exclude, names)
    check_patterns("--include", include, names)
    for name in names:
        if include and not matches(name, include):
            continue
        if matches(name, exclude):
            copied[name] = "excluded"
            continue
        places = [name if name in part.specs else tied_alias(part, name) or "" for part in inputs]
        missing = [part.label for part, place in zip(inputs, places, strict=True) if not place]
        if missing:
            problems.append(f"{name} is missing in {', '.join(missing)}")
            continue
        specs = [part.specs[place] for part, place in zip(inputs, places, strict=True)]
        if len({spec.shape for spec in specs}) > 1:
            shapes = ", ".join(f"{part.label} has {spec.shape}" for part, spec in zip(inputs, specs, strict=True))
            problems.append(f"{name}: {shapes}")
            vocabularies |= all(vocabulary_size(part) == spec.rows for part, spec in zip(inputs, specs, strict=True))
        elif all(spec.is_float for spec in specs):
            merged[name] = tuple(places)
        else:
            copied[name] = f"{specs[0].dtype}, must be equal in all"
    for name, reason in copied.items():
        if reason == "excluded" and name not in donor.specs:
            problems.append(f"{name} is excluded but {donor.label}, from which it would be copied, does not have it")
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        advice = "Leave tensors out with --exclude (they are then copied), or align the models first"
        if vocabularies:
            advice = "Their vocabularies differ: align them with --tokenizer union, base or a model (`tokenizer:` in a recipe)"
        raise CheckpointError(f"the models do not fit together: {shown}. {advice}")
    return Account(merged, copied)


class _Bound:
    """A method with its options, ready to be applied to any tensor."""

    def __init__(self, method: MergeMethod, arguments: dict[str, Any], models: int, how: MergeOptions, with_base: bool) -> None:
        self.method, self.arguments, self.how, self.with_base = method, arguments, how, with_base
        self.statistic_arguments = {name: value for name, value in {"models": models, **arguments}.items() if name in method.statistic_takes}

    def measure(self, scan: Scan) -> Any:
        assert self.method.statistic is not None
        carry = self.how.allow_nonfinite
        try:
            return self.method.statistic(_ModelScan(scan, self._split, carry), **self.statistic_arguments)
        except _NotFinite:
            raise _find_nonfinite(scan) from None

    def run(self, spec: TensorSpec, labels: Sequence[str]) -> Run:
        dtype = TORCH_DTYPES[spec.dtype]
        row_elements = spec.numel // max(1, spec.rows)
        inside = self.method.inside

        def apply(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
            if not self.how.allow_nonfinite:
                for label, tensor in zip(labels, tensors, strict=True):
                    if not is_finite(tensor):
                        raise nonfinite(label, spec.name, tensor)
            base, models = self._split(tensors)
            first = first_row * row_elements
            known = {"measured": measured, "noise": Noise(self.how.seed, spec.name, first) if "noise" in inside else None, "first": first}
            given = {name: known[name] for name in inside}
            with torch.no_grad():
                result = self.method.function(*((base,) if self.method.takes_base else ()), models, **given, **self.arguments)
            return (result.to(dtype).to("cpu"),)

        return apply

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        if self.how.input_dtype:
            tensors = [tensor.to(TORCH_DTYPES[self.how.input_dtype]) for tensor in tensors]
        if self.how.device != "cpu":
            tensors = [tensor.to(self.how.device) for tensor in tensors]
        return (tensors[0], tensors[1:]) if self.with_base else (None, tensors)


def _by_position(method: MergeMethod, options: Mapping[str, object], donor: Checkpoint) -> OptionsOf:
    """Options that vary with the layer as a function of the tensor's name; a tensor that `donor` lacks, a head, is after the last layer."""
    if found := varying.problems(method, options):
        raise OptionError("; ".join(found))
    where, elsewhere = positions(donor), Position(1.0, "rest")
    return lambda name: varying.at(options, where.get(name, elsewhere))


def _binder(method: MergeMethod, options: Mapping[str, object] | OptionsOf, models: int, how: MergeOptions, with_base: bool) -> Callable[[str], _Bound]:
    """The method bound to the options of a tensor, by its name; what is the same is checked and bound once.

    Errors, now or when called: OptionError for impossible options, and for ones that vary though the whole model is measured by them.
    """

    def bind(given: Mapping[str, object]) -> _Bound:
        arguments = method.options.check(given, models)
        if method.check is not None:
            method.check(arguments)
        return _Bound(method, arguments, models, how, with_base)

    if not callable(options):
        single = bind(options)
        return lambda name: single
    known: dict[tuple[tuple[str, object], ...], _Bound] = {}

    def bound_of(name: str) -> _Bound:
        given = options(name)
        key = tuple((option, tuple(value) if isinstance(value, list) else value) for option, value in given.items())
        if key not in known:
            try:
                known[key] = bound = bind(given)
            except OptionError as error:
                raise OptionError(f"{name}: {error}") from None
            first = next(iter(known.values())).statistic_arguments
            varying = [option.rstrip("_") for option, value in bound.statistic_arguments.items() if value != first[option]]
            if varying and method.scope == "model":
                raise OptionError(f"{name}: {method.name} measures the whole model by {', '.join(varying)}, which may not vary from tensor to tensor")
        return known[key]

    return bound_of


@dataclass(frozen=True)
class _ModelScan:
    """A scan as a method's statistic sees it: base and models instead of what a step reads, and finite values only.

    Order statistics do not exist where there are NaNs: these are refused, or, with `carry`, counted as zeros.
    """

    scan: Scan
    split: Callable[[Sequence[Tensor]], tuple[Tensor | None, Sequence[Tensor]]]
    carry: bool
    passes: list[bool] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.scan.size

    def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False, only: Collection[int] | None = None) -> Sequence[Any]:
        look = self.carry or not any(self.passes)  # the values of a later pass are those of the first

        def visit(tensors: Sequence[Tensor]) -> Any:
            if look and not all(map(is_finite, tensors)):
                if not self.carry:
                    raise _NotFinite
                tensors = [tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for tensor in tensors]
            return function(*self.split(tensors))

        results = self.scan.map(visit, sample, only)
        self.passes.append(not sample and only is None)
        return results

    def recall(self, compute: Callable[[], Any]) -> Any:
        result = self.scan.recall(compute)
        self.passes.append(True)  # a result that was noted once is of values that were looked at
        return result


class _NotFinite(Exception):
    """A measurement met a NaN or an infinity."""


def _find_nonfinite(scan: Scan) -> CheckpointError:
    """Which input holds the value; the tensors are read once more, for a measurement is not told their names."""
    for step in scan.steps:
        for part, name in step.reads:
            for rows in step.slabs():
                tensor = part.read(name, rows if step.cut else None)
                if not is_finite(tensor):
                    return nonfinite(part.label, name, tensor)
    return CheckpointError("an input holds values that are NaN or infinite; mend the model, or carry them with --allow-nonfinite")


def donor_spec(reads: Sequence[tuple[Checkpoint, str]]) -> TensorSpec:
    """The spec of the first thing read."""
    part, name = reads[0]
    return part.specs[name]


def _starts_at_first(method: MergeMethod, models: int, base: bool) -> bool:
    """Whether the first model is the base: between two models without one, it is where the way begins."""
    return method.needs_base and not base and method.models == (1, 1) and models == 2


def _misfit(method: MergeMethod, models: int, base: bool) -> str | None:
    """Why a method cannot take this many models."""
    least, most = method.models
    if most == 1 and method.needs_base and (models != 1 or not base):
        return f"{method.name} goes from one model to another: give two models, or a base and one model, not {models}{' and a base' if base else ''}"
    if method.needs_base and not base:
        return f"{method.name} works on task vectors and needs the model they start from: give it with --base"
    if models < least or (most is not None and models > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        return f"{method.name} merges {wanted} model{'s' * (wanted != '1')}{' besides the base' if method.takes_base and base else ''}, not {models}"
    return None


def _result_dtype(specs: Sequence[TensorSpec], how: MergeOptions) -> str:
    if how.dtype or how.input_dtype:
        return how.dtype or how.input_dtype or ""
    dtype = TORCH_DTYPES[specs[0].dtype]
    for spec in specs[1:]:
        dtype = torch.promote_types(dtype, TORCH_DTYPES[spec.dtype])
    return TAGS[dtype]


def _copied(name: str, inputs: Sequence[Checkpoint], donor: Checkpoint, how: MergeOptions) -> Step:
    holders = [part for part in inputs if name in part.specs]
    if matches(name, how.exclude) or len(holders) == 1:
        return copy_step(donor, name)
    reads = tuple((part, name) for part in holders)

    def equal(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        for part, tensor in zip(holders[1:], tensors[1:], strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise CheckpointError(f"{name} is not a float tensor and differs between {holders[0].label} and {part.label}; --exclude it to copy it")
        return tensors[:1]

    return Step(reads, (donor.specs.get(name, holders[0].specs[name]),), equal)


def with_merged_config(result: Checkpoint, inputs: Sequence[Checkpoint], split: bool) -> Checkpoint:
    """Config entries that a merge changes: the dtype, and whether the head is tied; `split`: where one input stores a head, another's embedding went in."""
    changes: dict[str, Any] = {}
    dtypes = {spec.dtype for spec in result.specs.values() if spec.is_float}
    if len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in result.config else "dtype"
        if key in result.config:
            changes[key] = config_dtype(dtypes.pop())
    # A head that only some inputs store is written; a config that is silent about tying may tie it all the same.
    said = [part.config.get("tie_word_embeddings") for part in inputs]
    if False in said and result.config.get("tie_word_embeddings", split or None):
        changes["tie_word_embeddings"] = False
    return result.with_config(**changes) if changes else result
