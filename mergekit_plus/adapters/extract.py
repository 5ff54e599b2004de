"""An adapter out of a fine-tune: the difference of two models, brought to a low rank module by module.

Two passes over the models: one that says what changed by how much (and, where ranks follow from an energy, which ranks), so that the
adapter can be laid out before it is computed; and one that computes it. `kept` is a third that measures what was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from ..calibration.statistics import MomentsFile
from ..checkpoint import Checkpoint, Plan, Scan, Step, TensorSpec, copy_step
from ..checkpoint.hub import parse_reference
from ..checkpoint.plan import row_multiple
from ..checkpoint.spec import check_patterns, matches, natural_order
from ..errors import CheckpointError, OptionError
from ..model import Meaning, ModelMap, adapter_reason, describe, quantized_reason, tied_alias
from ..progress import Progress, quiet
from .apply import apply, targets
from .layout import Product, adapter_of
from .lowrank import factors, leading, rank_for
from .peft import PREFIX, read_adapter, refuse_misfits
from .weighted import leading_for


@dataclass(frozen=True)
class ExtractOptions:
    """How to extract: ranks by number or by energy, and what becomes of tensors that are no matrices of linear layers."""

    rank: int | None = None  # of each module
    energy: float | None = None  # least share of each difference's squared Frobenius norm that is kept
    exclude: tuple[str, ...] = ()  # shell patterns of tensors that stay as the base has them
    save_rest: bool = False  # store norms, embeddings, heads, biases that changed whole, so that nothing is lost but by rank
    dtype: str = "F32"  # of the factors

    def problems(self, calibrated: bool = False) -> list[str]:
        """Everything wrong with them, a sentence each; calibrated: for differences that a text weighs."""
        found = []
        if calibrated and self.energy is not None:
            found.append("an energy is of the differences alone; with a calibration text, give a rank")
        if (self.rank is None) == (self.energy is None):
            found.append("give a rank, or an energy from which ranks follow, and not both")
        if self.rank is not None and self.rank < 1:
            found.append(f"rank must be 1 or more, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            found.append(f"energy is a share, above 0 and up to 1, not {self.energy:g}")
        return found


def extract(
    base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, progress: Progress | None = None, moments: Checkpoint | None = None
) -> Checkpoint:
    """The LoRA adapter that makes `tuned` of `base`, in peft's layout: of the weight of every linear layer that changed, the leading singular
    triples of the difference, taken in float32.

    moments: of the inputs of the fine-tune's layers on a text, as `calibrate` makes them; with them each layer gets what is best for its outputs on the
    text, as far as they say something of it. Reads both once before it returns (with an energy, it decomposes every difference too).
    Errors: OptionError for impossible options; CheckpointError where the models do not fit together, or are equal.
    """
    if found := options.problems(calibrated=moments is not None):
        raise OptionError("; ".join(found))
    grams = MomentsFile(moments) if moments is not None else None
    if grams is not None:
        grams.check(tuned)
    pairs = pairs_of(base, tuned, options.exclude)
    progress = progress or quiet()
    meanings = describe(base)
    roles = meanings.tensors
    changed = []
    with progress.phase("comparing", sum(base.specs[place].nbytes for place in pairs.values())), _workers() as pool:
        changes = pool.map(lambda name: squares_of([(base, pairs[name]), (tuned, name)])[0], pairs)
        for name, change in zip(pairs, changes, strict=True):
            if not isfinite(change):
                raise CheckpointError(f"{name} holds values that are NaN or infinite in {base.label} or {tuned.label}; mend the model, or --exclude it")
            if change:
                changed.append(name)
            progress.advance(base.specs[pairs[name]].nbytes)
    left_out = [name for name in changed if matches(name, options.exclude)]
    linears = {name: roles[name] for name in changed if name in roles and name not in left_out and roles[name].role == "linear"}
    rest = [name for name in changed if name not in linears and name not in left_out]
    if not linears and not (rest and options.save_rest):
        what = "--exclude leaves nothing" if left_out else "no linear layer differs" if rest else "they are equal"
        raise CheckpointError(f"there is no adapter between {base.label} and {tuned.label}: {what}")

    differences = Checkpoint(f"{tuned.label} - {base.label}", Plan([_difference(base, tuned, name) for name in linears]))
    module_of = _modules(meanings)
    products, steps = [], []
    for name, (rank, count) in _ranks(differences, linears, module_of, options, progress).items():
        meaning, shape = linears[name], base.specs[name].shape
        product = Product(module_of[name], rank, shape[::-1] if meaning.transposed else shape)
        products.append(product)
        gram = grams.reads(name)[:1] if grams is not None and name in grams else ()
        steps.append(product.step([(differences, name), *gram], _Truncate(product.module, rank, count, meaning.transposed), options.dtype))
    saved, stored = _saved(tuned, rest, linears, module_of, meanings.tied) if options.save_rest else ([], {})
    steps += [copy_step(tuned, name, to) for to, name in stored.items()]
    there = parse_reference(base.pinned)
    name, revision = (there.repo, there.revision) if there and not there.path else (base.ref, None)
    return adapter_of(
        f"adapter of {tuned.label}", products, steps, name, task_of(base), revision=revision,
        fan_in_fan_out=any(meaning.transposed for meaning in linears.values()), modules_to_save=saved,
        biases=any(".base_layer." in to for to in stored), tied=any(name in stored.values() for name, *_ in meanings.tied),
    )  # fmt: skip


def pairs_of(base: Checkpoint, tuned: Checkpoint, exclude: Sequence[str]) -> dict[str, str]:
    """Every float tensor of the fine-tune, and where the base has it.

    Errors: CheckpointError where the base lacks one or has another shape, and what only the base has.
    """
    for part in (base, tuned):
        if reason := quantized_reason(part) or adapter_reason(part):
            raise CheckpointError(reason)
    pairs: dict[str, str] = {}
    problems = []
    check_patterns("--exclude", exclude, tuned.specs)
    for name in sorted({*tuned.specs, *base.specs}, key=natural_order):
        places = [name if name in part.specs else tied_alias(part, name) for part in (base, tuned)]
        place = places[0]
        if place is None or places[1] is None:
            problems.append(f"{name} is missing in {(base if place is None else tuned).label}")
        elif name not in tuned.specs:
            problems.append(f"{name} is tied in {tuned.label} alone, which no adapter can do")
        elif base.specs[place].shape != tuned.specs[name].shape:
            if not matches(name, exclude):
                problems.append(f"{name}: {base.label} has {base.specs[place].shape}, {tuned.label} has {tuned.specs[name].shape}")
        elif base.specs[place].is_float and tuned.specs[name].is_float:
            pairs[name] = place
    refuse_misfits("the models do not fit together", problems, "An adapter needs a base with the same tensors; leave out what has other shapes with --exclude")
    return pairs


def squares_of(reads: Sequence[tuple[Checkpoint, str]]) -> list[float]:
    """The squared norm of the difference between the first tensor and each of the others; float64 sums of float32 differences."""
    part, name = reads[0]
    step = Step(tuple(reads), (part.specs[name],), lambda tensors, first_row, measured: tensors[:1], row_multiple(part.specs[name]))
    parts = Scan([step]).map(lambda tensors: [float((tensors[0].float() - other.float()).double().square().sum()) for other in tensors[1:]])
    return [sum(column) for column in zip(*parts, strict=True)]


def _difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Step:
    """`tuned - base` of one tensor, in float32."""

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (tensors[1].float() - tensors[0].float(),)

    return Step(((base, name), (tuned, name)), (TensorSpec(name, "F32", base.specs[name].shape),), run, row_multiple(base.specs[name]))


def _ranks(
    differences: Checkpoint, linears: Mapping[str, Meaning], module_of: Mapping[str, str], options: ExtractOptions, progress: Progress
) -> dict[str, tuple[int, int]]:
    """The rank of each layer, and how many triples are asked for to get it. An energy needs each difference, one in memory for each core."""
    energy = options.energy
    if energy is None:
        ranks = {name: min(options.rank or 1, *differences.specs[name].shape) for name in linears}
        return {name: (rank, rank) for name, rank in ranks.items()}

    def rank_of(name: str) -> tuple[int, int]:
        matrix = differences.read(name)
        return rank_for(matrix.T if linears[name].transposed else matrix, energy, module_of[name])

    found = {}
    with progress.phase("finding ranks", len(linears), " layers"), _workers() as pool:
        for name, rank in zip(linears, pool.map(rank_of, linears), strict=True):
            found[name] = rank
            progress.advance(1)
    return found


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core; torch keeps to the one that it is called from, as it does in `save`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Truncate:
    """The factors of a difference, and of the Gram matrix of its inputs where there is one."""

    def __init__(self, module: str, rank: int, count: int, transposed: bool) -> None:
        self.module, self.rank, self.count, self.transposed = module, rank, count, transposed

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        matrix, *gram = tensors[0].T if self.transposed else tensors[0], *tensors[1:]
        u, s, v = leading_for(matrix, gram[0], self.count, self.module) if gram else leading(matrix, self.count, self.module)
        return factors(u[:, : self.rank], s[: self.rank], v[:, : self.rank])


def _modules(meanings: ModelMap) -> dict[str, str]:
    """The module of every tensor, as transformers names it; as the checkpoint does where several tensors are one parameter there (experts)."""
    parameters = meanings.parameters
    return {name: parameters.get(name, name).rpartition(".")[0] for name in meanings.tensors}


def _saved(
    tuned: Checkpoint, rest: Sequence[str], linears: Mapping[str, Meaning], module_of: Mapping[str, str], tied: Sequence[Sequence[str]]
) -> tuple[list[str], dict[str, str]]:
    """modules_to_save, and the tensors that are stored whole: their names in the adapter and in the fine-tune.

    peft takes whole modules, and every module whose name ends in one that is asked for; a tensor that is tied to one of these keeps the
    base's values unless it is stored too.
    """
    adapted = {module_of[name] for name in linears}
    places = {name: (module_of.get(name, name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tuned.specs}
    stored = {f"{PREFIX}{module}.base_layer.{leaf}": name for name in rest for module, leaf in [places[name]] if module in adapted}
    wanted = dict.fromkeys(module for name in rest for module, _ in [places[name]] if module not in adapted)
    for source, *aliases in tied:
        if source in rest:
            wanted |= dict.fromkeys(alias.rpartition(".")[0] for alias in aliases)
            places |= {alias: (alias.rpartition(".")[0], alias.rpartition(".")[2]) for alias in aliases if alias not in places}
    alias_of = {alias: source for source, *aliases in tied for alias in aliases if alias not in tuned.specs}
    for name, (module, leaf) in places.items():
        if module not in adapted and any(module.endswith(saved) for saved in wanted):
            stored[f"{PREFIX}{module}.{leaf}"] = alias_of.get(name, name)
    return list(wanted), stored


def task_of(base: Checkpoint) -> str | None:
    """peft's task_type, where the architecture says it."""
    names = base.config.get("architectures") or [""]
    return "CAUSAL_LM" if str(names[0]).endswith(("ForCausalLM", "LMHeadModel")) else None


@dataclass(frozen=True)
class Kept:
    """What an adapter keeps of the change of one tensor: the norm of the change, and of what is left of it."""

    name: str
    kind: Literal["low rank", "whole", "left out"]
    rank: int | None
    change: float
    left: float

    @property
    def relative(self) -> float:
        """What is lost, relative to the change."""
        return self.left / self.change


def kept(base: Checkpoint, tuned: Checkpoint, adapter: Checkpoint, exclude: Sequence[str] = ()) -> list[Kept]:
    """Measure an adapter: every tensor of the fine-tune that differs from the base, and what the base with the adapter lacks of it, in float32.

    exclude: as for `extract`; what has another shape in the base is not measured.
    """
    read = read_adapter(adapter)
    products = targets(base, read)
    adapted = apply(Checkpoint(base.label, Plan([_widened(base, name) for name in base.specs]), base.files), [read])
    found = []
    pairs = pairs_of(base, tuned, exclude)

    def measure(name: str) -> list[float]:
        return squares_of([(tuned, name), (base, pairs[name]), (adapted, name if name in adapted.specs else pairs[name])])

    with _workers() as pool:
        measured = list(pool.map(measure, pairs))
    for name, (change, left) in zip(pairs, measured, strict=True):
        if change:
            kind: Literal["low rank", "whole", "left out"] = "low rank" if name in products else "left out" if left == change else "whole"
            found.append(Kept(name, kind, products[name].rank if name in products else None, sqrt(change), sqrt(left)))
    return found


def _widened(base: Checkpoint, name: str) -> Step:
    """A tensor in float32, so that what is measured is the adapter and not how its result is rounded."""
    spec = base.specs[name]
    if not spec.is_float:
        return copy_step(base, name)
    return Step(((base, name),), (TensorSpec(name, "F32", spec.shape),), lambda tensors, first_row, measured: (tensors[0].float(),), row_multiple(spec))


def overall(tensors: Sequence[Kept]) -> float:
    """What is lost of all tensors together, relative to their change."""
    change = sum(tensor.change**2 for tensor in tensors)
    return sqrt(sum(tensor.left**2 for tensor in tensors) / change) if change else 0.0
