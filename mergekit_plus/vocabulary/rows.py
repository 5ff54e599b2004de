"""From tokens to rows: which row of which model goes to each place of the new vocabulary, and the steps that put it there.

Everything is arrays over the new vocabulary, so that 152,000 tokens are planned at once and read run by run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Measured, Plan, Scan, Step, TensorSpec, copy_step
from ..checkpoint.dtypes import TAGS, TORCH_DTYPES
from ..checkpoint.plan import Run
from ..errors import CheckpointError
from ..model import tied_alias, vocabulary_size
from .spec import ModelToken, TokenRule, ZeroRow

ZERO, MEAN, PADDING = -1, -2, -3  # origins of rows that are no row of a model
PLACES = 256  # runs of rows that are read one by one


@dataclass(frozen=True, eq=False)
class Table:
    """For each id of the new vocabulary: `origin`, the number of the model whose row it is (or ZERO, MEAN, PADDING), and `row`, its row there."""

    origin: Tensor
    row: Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """A model that rows may come from: its tokens, and how many rows its tables have."""

    checkpoint: Checkpoint
    tokens: Mapping[str, int]

    @property
    def rows(self) -> int:
        return vocabulary_size(self.checkpoint) or 0


def own_rows(source: Source, tokens: Mapping[str, int], size: int) -> Tensor:
    """The model's row for each id of the new vocabulary, -1 where it has none.

    An id that is no token, here and there, is padding; it keeps the model's padding.
    """
    rows = torch.full((size,), -1, dtype=torch.int64)
    here, there = (torch.tensor(list(table.values()), dtype=torch.int64) for table in (tokens, source.tokens))
    rows[here] = torch.tensor([source.tokens.get(token, -1) for token in tokens], dtype=torch.int64)
    rows[rows >= source.rows] = -1
    padding = torch.ones(max(size, source.rows, int(there.max()) + 1), dtype=torch.bool)
    padding[here] = padding[there] = False
    places = torch.nonzero(padding[: min(size, source.rows)]).flatten()
    rows[places] = places
    return rows


def table(own: Sequence[Tensor], tokens: Mapping[str, int], rules: Mapping[str, tuple[int, int]], base: int | None) -> Table:
    """What stands in the place of a missing row: the rule's; else the base's row; else the only owner's; else the mean of all owners.

    own: `own_rows` of each merged model. rules: for a token the (origin, row) that its rule names. A token that no model has is zeros.
    """
    has = torch.stack(list(own)) >= 0  # [models, ids]
    owners = has.sum(0)
    origin = torch.where(owners > 1, MEAN, PADDING)
    origin = torch.where(owners == 1, has.int().argmax(0), origin)
    if base is not None:
        origin = torch.where(has[base], base, origin)
    named = torch.zeros_like(origin, dtype=torch.bool)
    named[torch.tensor(list(tokens.values()), dtype=torch.int64)] = True
    origin = torch.where(named & (origin == PADDING), ZERO, origin)
    row = torch.stack(list(own)).gather(0, origin.clamp(min=0)[None])[0]
    for token, (number, place) in rules.items():
        origin[tokens[token]], row[tokens[token]] = number, place
    return Table(origin, torch.where(origin >= 0, row, -1))


def of_model(default: Table, number: int, own: Tensor, forced: Tensor) -> Table:
    """The table of one model: its own rows where it has them and none is forced."""
    keeps = own >= 0
    keeps[forced] = False
    return Table(torch.where(keeps, number, default.origin), torch.where(keeps, own, default.row))


def rule_row(token: str, rule: TokenRule, sources: Mapping[str, Source]) -> tuple[int, int] | None:
    """The (origin, row) that a rule names; None where it names none.

    Errors: CheckpointError for a model that has no such row.
    """
    if rule.source is None or isinstance(rule.source, ZeroRow):
        return None if rule.source is None else (ZERO, -1)
    name = rule.source.model if isinstance(rule.source, ModelToken) else rule.source
    source = sources[name]
    wanted = (rule.source.token if isinstance(rule.source, ModelToken) else token) or ""
    row = rule.source.token_id if isinstance(rule.source, ModelToken) and rule.source.token_id is not None else source.tokens.get(wanted, -1)
    if not 0 <= row < source.rows:
        what = f"token '{wanted}'" if row < 0 else f"row {row}, its tables have {source.rows}"
        raise CheckpointError(f"tokenizer: '{token}' is to be taken from {source.checkpoint.label}, which has no {what}")
    return list(sources).index(name), row


def rerow(name: str, number: int, of: Table, own: Sequence[Tensor], sources: Sequence[Checkpoint]) -> Step:
    """The step that writes the table `name` of model `number` with the rows of the new vocabulary, in the widest dtype that it reads.

    Errors: CheckpointError where a row is to come from a model that lacks the tensor, or has rows of another shape.
    """
    if _untouched(of, number, sources[number].specs[name]):
        return copy_step(sources[number], name)
    means = of.origin == MEAN
    reads, picks = [], []
    for place, source in enumerate(sources):
        pick = torch.where(of.origin == place, of.row, -1)
        if place < len(own):
            pick = torch.where(means, own[place], pick)
        if place == number or bool((pick >= 0).any()):
            reads.append((source, name if name in source.specs else tied_alias(source, name) or name))
            picks.append(pick)
    _check_rows(name, sources[number], reads)
    specs = [source.specs[held] for source, held in reads]
    dtype = TORCH_DTYPES[specs[0].dtype]
    for spec in specs[1:]:
        dtype = torch.promote_types(dtype, TORCH_DTYPES[spec.dtype])
    written = TensorSpec(name, TAGS[dtype], (len(of.origin), *specs[0].shape[1:]))
    step = Step(tuple(reads), (written,), _compose(picks, means, dtype), 0 if any(map(_scattered, picks)) else 1, takes=tuple(picks))
    return _padded(step, sources[number].label, of.origin == PADDING) if bool((of.origin == PADDING).any()) else step


def _scattered(pick: Tensor) -> bool:
    """Whether its rows lie in so many places that the table is better read whole, in one go."""
    return int((torch.diff(pick[pick >= 0]) != 1).sum()) > PLACES


def _untouched(of: Table, number: int, spec: TensorSpec) -> bool:
    return len(of.origin) == spec.rows and bool((of.origin == number).all()) and torch.equal(of.row, torch.arange(spec.rows))


def _check_rows(name: str, model: Checkpoint, reads: Sequence[tuple[Checkpoint, str]]) -> None:
    for source, held in reads:
        if held not in source.specs:
            raise CheckpointError(f"{name}: {model.label} lacks tokens whose rows {source.label} would give, but that has no such tensor")
        theirs, ours = source.specs[held], model.specs[name]
        if theirs.shape[1:] != ours.shape[1:] or not theirs.is_float:
            raise CheckpointError(f"{name}: {model.label} has {ours.dtype} {ours.shape}, {source.label} {theirs.dtype} {theirs.shape}: their rows do not fit")


def _compose(picks: Sequence[Tensor], means: Tensor, dtype: torch.dtype) -> Run:
    """The function of a step that puts rows together: what is read has zeros where a row is another's."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        cut = slice(first_row, first_row + len(tensors[0]))
        there = [pick[cut] >= 0 for pick in picks]
        whole = next((tensor for tensor, mask in zip(tensors, there, strict=True) if bool(mask.all())), None)
        mixed = torch.nonzero(means[cut]).flatten()
        if whole is not None and not len(mixed):
            return (whole.to(dtype),)
        rows = torch.zeros((len(tensors[0]), *tensors[0].shape[1:]), dtype=dtype)
        for tensor, mask in zip(tensors, there, strict=True):
            rows[mask] = tensor[mask].to(dtype)
        if len(mixed):
            total = torch.stack([tensor[mixed].to(wide) for tensor in tensors]).sum(0)
            owners = torch.stack([mask[mixed] for mask in there]).sum(0)
            rows[mixed] = (total / owners.view(-1, *[1] * (total.dim() - 1))).to(dtype)
        return (rows,)

    return run


def _padded(step: Step, label: str, padding: Tensor) -> Step:
    """The step with the mean of all other rows where padding is (J. Hewitt, "Initializing new word embeddings", 2021)."""
    spec, others = step.writes[0], int((~padding).sum())

    def mean(scan: Scan) -> Tensor:
        sums = scan.map(lambda tensors: tensors[0].sum(0, dtype=torch.float64))
        return torch.stack(list(sums)).sum(0) / max(1, others)

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        rows = tensors[0].clone()
        rows[padding[first_row : first_row + len(rows)]] = measured.to(rows.dtype)
        return (rows,)

    measured = Measured(mean)
    bare = Checkpoint(label, Plan([step]))
    padded = Step(((bare, spec.name),), (replace(spec),), run, 1, measured)
    measured.steps.append(padded)
    return padded
