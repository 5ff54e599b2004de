"""Retraining as an operation: a checkpoint, a text and what is to train, to a checkpoint whose zeros are where they were.

What changes is known from headers alone: the tensors that the variants train, each in the dtype that it had; every other tensor is copied. The
training itself is one deferred computation. It holds the model in float32. What a compact checkpoint stores once trains once, and is compact afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mergekit_plus.calibration.text import read_text
from mergekit_plus.checkpoint import Checkpoint, Deferred, Plan, TensorSpec, Work, copy_step
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.evaluate import load_model, load_tokenizer, windows
from mergekit_plus.model import adapter_reason, describe, meta_model, quantized_reason
from mergekit_plus.training import Loss, TrainOptions, TrainRecord, distillation, from_first, loss_on, next_token, several_processes, train

from .fold.blocks import blocks_of
from .fold.compact import fold_of
from .fold.surgery import stack_of
from .fold.tail import with_tail
from .fold.tied import load_tied, sites_of_compact, stored, without_voices
from .perp import VARIANTS, Adapted, Share, Site, adapt, check_variants, chosen_sites, report

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # that `tune_lr` tries
TUNING = 4  # each of them for this part of the steps
HELD_OUT = 32  # windows at most, evenly out of the text, on which a rate and the best state are chosen
ALL = 1 << 40  # windows

_TRAINING: TypeAdapter[TrainOptions] = TypeAdapter(TrainOptions)


@dataclass(frozen=True)
class RetrainOptions:
    """What trains on what. `distill` is the teacher's part of the loss; the rest is the cross entropy of the text.

    tail: how many of the last blocks are drawn towards the teacher's blocks that they were, too, with `tail_weight`. kept: which of the teacher's
    blocks the model's are; as a compact checkpoint says it, or all of them, where it is not said.
    """

    train: tuple[str, ...]
    text: tuple[Path, ...] | Tensor  # files, or windows of them, int64 [windows, window]
    variant_options: Mapping[str, Any] = field(default_factory=dict)
    training: TrainOptions = field(default_factory=TrainOptions)
    window: int | None = None  # tokens; by default as for perplexity
    distill: float = 1.0
    tail: int = 0
    tail_weight: float = 1.0
    kept: tuple[int, ...] | None = None
    tune_lr: bool = False
    allow_densify: bool = False
    device: str = "cpu"


def split_options(given: Mapping[str, Any], variants: Sequence[str]) -> tuple[TrainOptions, dict[str, Any], list[str]]:
    """The options of the training among these, those of the variants, and everything wrong with them, a sentence each."""
    ours = {name: value for name, value in given.items() if name in TrainOptions.__dataclass_fields__}
    theirs = {name: value for name, value in given.items() if name not in ours}
    found = check_variants(variants, {})
    known = [VARIANTS[name] for name in variants if name in VARIANTS]
    names = [option for variant in known for option in variant.options.table]
    for name in [name for name in theirs if name not in names]:
        found.append(f"there is no option '{name}'.{nearest(name, [*TrainOptions.__dataclass_fields__, *names])}")
        del theirs[name]
    if not found:
        found += check_variants(variants, theirs)
    try:
        training = _TRAINING.validate_python(ours)
        return training, theirs, found + training.problems()
    except ValidationError as error:
        return TrainOptions(), theirs, found + [f"{problem['loc'][0]}={problem['input']!r}: {problem['msg']}" for problem in error.errors()]


def retrain(checkpoint: Checkpoint, options: RetrainOptions, teacher: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint with what its variants train trained on a text, or towards a teacher; zeros of linear weights stay.

    A compact checkpoint, or the model that it was opened as, stays compact: what blocks share trains once.
    Nothing is computed before a tensor is read; the computation is resumable. `trainable` says what trains.
    Errors: OptionError for options that cannot be, and where there is nothing to train; CheckpointError for what is quantised, no causal model, or
    unknown to transformers.
    """
    checkpoint = stored(checkpoint)
    if teacher is not None and (reason := quantized_reason(teacher) or adapter_reason(teacher)):
        raise CheckpointError(reason)
    sites = _sites(checkpoint, options)
    _tail(checkpoint, options, teacher)
    chosen = chosen_sites(sites, options.train)
    specs = {site.name: TensorSpec(site.name, _dtype(checkpoint, site), site.shape) for site in chosen}
    shares = _shares(checkpoint, options, sites)
    memory = 4 * sum(spec.numel for spec in without_voices(checkpoint).specs.values()) + 20 * shares[-1].parameters
    told = _report(shares)
    reads = [checkpoint, *([teacher] if teacher is not None else [])]
    made = Checkpoint("retrained", Deferred(specs.values(), reads, partial(_compute, checkpoint, options, teacher, sites, told), memory=memory))
    names = [*checkpoint.specs, *(name for name in specs if name not in checkpoint.specs)]
    steps = [copy_step(made if name in specs else checkpoint, name) for name in names]
    label = f"{checkpoint.label}, {', '.join(options.train)} retrained"
    result = Checkpoint(label, Plan(steps), checkpoint.files, (*checkpoint.notes, told))
    return _untied(result) if any(site.tied for site in chosen) else result


def trainable(checkpoint: Checkpoint, options: RetrainOptions) -> list[Share]:
    """What each variant trains, and all together ("total"): tensors, parameters, and percent of the model's; from headers alone."""
    checkpoint = stored(checkpoint)
    return _shares(checkpoint, options, _sites(checkpoint, options))


def _sites(checkpoint: Checkpoint, options: RetrainOptions) -> tuple[Site, ...]:
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    if problems := check_variants(options.train, options.variant_options) + options.training.problems():
        raise OptionError("; ".join(problems))
    dense = [name for name in options.train if VARIANTS[name].densifies]
    if dense and not options.allow_densify:
        raise OptionError(f"{dense[0]} trains the smallest weights, zeros first, so that what was pruned comes back; allow it with --allow-densify")
    return sites_of_compact(checkpoint)


def _tail(checkpoint: Checkpoint, options: RetrainOptions, teacher: Checkpoint | None) -> list[tuple[int, int]]:
    """The last blocks of the model, and the teacher's that they are drawn towards. Errors: OptionError where it is not known which, or is not there."""
    if not options.tail:
        return []
    if teacher is None:
        raise OptionError("the tail is drawn towards a teacher's blocks: give one with --teacher")
    blocks, theirs, fold = len(stack_of(without_voices(checkpoint)).layers), len(stack_of(teacher).layers), fold_of(checkpoint)
    kept = options.kept or (fold.kept if fold is not None else tuple(range(blocks)) if blocks == theirs else None)
    if kept is None:
        raise OptionError(f"which of the teacher's {theirs} blocks the {blocks} of {checkpoint.label} were is not known; say it with --kept 0,1,4")
    if len(kept) != blocks or max(kept) >= theirs or min(kept) < 0 or not 0 < options.tail <= blocks:
        raise OptionError(f"a tail of {options.tail} blocks of {len(kept)}, {list(kept)}: the model has {blocks} blocks, and its teacher {theirs}")
    return list(enumerate(kept))[-options.tail :]


def _shares(checkpoint: Checkpoint, options: RetrainOptions, sites: Sequence[Site]) -> list[Share]:
    twice = {name for group in describe(without_voices(checkpoint)).tied for name in group[1:]}
    total = sum(spec.numel for name, spec in checkpoint.specs.items() if name not in twice)
    return report(sites, options.train, options.variant_options, total)


def _report(shares: Sequence[Share]) -> str:
    *rows, total = shares
    parts = ", ".join(f"{row.variant} {row.parameters:,} ({row.percent:.3g} %)" for row in rows)
    return f"trains {total.parameters:,} parameters in {total.tensors} tensors, {total.percent:.3g} % of the model: {parts}"


def _dtype(checkpoint: Checkpoint, site: Site) -> str:
    """That of the tensor; of the embeddings for a head that is tied to them."""
    if site.name in checkpoint.specs:
        return checkpoint.specs[site.name].dtype
    return next(checkpoint.specs[group[0]].dtype for group in describe(without_voices(checkpoint)).tied if site.name in group)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """Its config.json says that the head is a matrix of its own."""
    inner = checkpoint.config.get("text_config")
    nested = {"text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return checkpoint.with_config(tie_word_embeddings=False, **nested)


# ---- the computation ----


def _compute(checkpoint: Checkpoint, options: RetrainOptions, teacher: Checkpoint | None, sites: Sequence[Site], told: str, work: Work) -> None:
    with several_processes(options.device):
        finished = from_first(lambda: work.has("retrained.safetensors"))
        tensors = {} if finished else _retrained(checkpoint, options, teacher, sites, told, work)
    work.part("retrained", lambda: tensors)


def _retrained(
    checkpoint: Checkpoint, options: RetrainOptions, teacher: Checkpoint | None, sites: Sequence[Site], told: str, work: Work
) -> dict[str, Tensor]:
    rows, held = _rows(checkpoint, options)
    work.progress.tell(told)
    model = load_tied(checkpoint, progress=work.progress)
    chosen = chosen_sites(sites, options.train)
    zeros = {site.name: _zeros(model.get_parameter(site.parameter)) for site in chosen if site.role == "linear"}
    adapted = adapt(model, sites, options.train, options.variant_options, options.training.seed)
    model.to(options.device)
    masks = {name: mask.to(options.device) for name, mask in adapted.masks.items()}
    rows, held = rows.to(options.device), held.to(options.device)
    loss: Loss = next_token
    if teacher is not None:
        master = load_model(teacher, progress=work.progress).to(options.device)
        loss = distillation(master, options.distill)
        if tail := _tail(checkpoint, options, teacher):
            blocks, targets = blocks_of(model, without_voices(checkpoint)).modules, blocks_of(master, teacher).modules
            loss = with_tail(loss, [blocks[ours] for ours, _ in tail], [targets[theirs] for _, theirs in tail], options.tail_weight)

    def run(training: TrainOptions, folder: str) -> TrainRecord:
        return train(
            model, adapted.parameters, loss, rows, training, masks=masks, evaluate=lambda: loss_on(model, held, loss),
            folder=work.folder / folder, kept=lambda file: work.keep(f"{folder}/{file}"), progress=work.progress,
        )  # fmt: skip

    training = replace(options.training, lr=_tuned(adapted, options.training, run, work)) if options.tune_lr else options.training
    record = run(training, "training")
    if record.stopped and record.best == 0:
        raise OptionError(f"{record.stopped}, and nothing was gained before; give a smaller --lr")
    merged = adapted.merge()
    tensors = {site.name: merged[site.name].to("cpu", TORCH_DTYPES[_dtype(checkpoint, site)], copy=True) for site in chosen}
    _tell(work, record, training, sum(_zeros(tensors[name]) - before for name, before in zeros.items()))
    return tensors


def _rows(checkpoint: Checkpoint, options: RetrainOptions) -> tuple[Tensor, Tensor]:
    """The windows of the text to train on, and those held out, int64 [windows, window]."""
    model = meta_model(without_voices(checkpoint))
    if isinstance(options.text, Tensor):
        rows = options.text
    else:
        window = windows(model, torch.zeros(1 << 20, dtype=torch.int64), options.window, 1).shape[1]  # of any long text
        rows = read_text(options.text, load_tokenizer(checkpoint), ALL, window)
    size = rows.shape[1]
    windows(model, rows.flatten(), size, 1)  # refuses what the model cannot read
    if len(rows) < 2:
        raise OptionError(f"the text is one window of {size} tokens; retraining needs one to train on and one to choose by: give a longer text")
    count = max(1, min(HELD_OUT, len(rows) // 10))
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[[(2 * number + 1) * len(rows) // (2 * count) for number in range(count)]] = True
    return rows[~chosen], rows[chosen]


def _tuned(adapted: Adapted, training: TrainOptions, run: Any, work: Work) -> float:
    """The rate that is best on what was held out, each having had a part of the steps from the same start."""
    start = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}
    found: dict[float, float] = {}
    for rate in RATES:
        record = run(replace(training, lr=rate, steps=max(1, training.steps // TUNING), evaluations=1), f"lr-{rate:g}")
        found[rate] = record.value
        work.progress.tell(f"a rate of {rate:g}: held-out loss {record.value:.4f}")
        with torch.no_grad():
            for name, parameter in adapted.parameters.items():
                parameter.copy_(start[name])
    return min(found, key=lambda rate: found[rate])


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def _tell(work: Work, record: TrainRecord, training: TrainOptions, new_zeros: int) -> None:
    """Say what came of it."""
    told = f"held-out loss {record.evaluations[0][1]:.4f} before, {record.value:.4f} after {record.best} steps at a rate of {training.lr:g}"
    if new_zeros > 0:
        told += f"; {new_zeros} more weights are zero, by cancellation or rounding"
    elif new_zeros < 0:
        told += f"; {-new_zeros} weights that were zero are not any more"
    work.progress.tell(told)
    if record.stopped:
        warnings.warn(f"{record.stopped}; the model is as it was after step {record.best}", stacklevel=2)
