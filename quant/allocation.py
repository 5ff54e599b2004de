"""`compress allocate` as one call: read the text, measure or reuse sensitivities, allocate, and write bits.yaml."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_plus.calibration.options import CalibrationOptions
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.inputs import input_files
from mergekit_plus.digests import Digests
from mergekit_plus.errors import OptionError, OutputError
from mergekit_plus.model import quantized_reason
from mergekit_plus.progress import Progress, quiet

from . import QUANTIZERS, proxies, sensitivity
from .bits_file import group_schemes, write
from .calibrated import Calibration
from .layer_groups import groups_of, label
from .mixed import Allocated, Budget, allocate, budget_bits
from .plan import quantize
from .quantized import Scheme
from .sensitivity import Group, Sensitivities

METHODS: dict[str, Callable[..., Sensitivities]] = {
    "kl": sensitivity.measure, "fisher": partial(proxies.measure, kind="fisher"), "gram": partial(proxies.measure, kind="gram"),
}  # fmt: skip
HELD_OUT = 3  # every third window of the text is kept from the losses, to choose among candidates
_CHOICE = re.compile(r"(\d+)(?:g(\d+))?(a|s)?")


@dataclass(frozen=True)
class AllocateOptions:
    """How to allocate. choices: schemes. reference: the choice of all groups while one is measured; "dense", or None for the middle one of them."""

    budget: Budget
    choices: tuple[Scheme, ...]
    calibration: CalibrationOptions
    sensitivity: str = "kl"
    reference: Scheme | str | None = None
    method: str = "rtn"
    settings: Mapping[str, Any] = field(default_factory=dict)
    format: str = "pack-quantized"
    exclude: tuple[str, ...] = ()
    candidates: int = 8
    sensitivities: Path | None = None  # a file that is read where it exists, and written where it does not
    overwrite: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Written:
    """What was allocated, from which sensitivities, and the file that holds it."""

    out: Path
    table: Sensitivities
    result: Allocated


def parse_choice(text: str, group_size: int, symmetric: bool) -> Scheme:
    """"3", "4g32" or "8a": bits, with a group size and a symmetry of its own where these stand behind (a: asymmetric, s: symmetric). Errors: OptionError."""
    match = _CHOICE.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"'{text.strip()}' is no choice; write bits, with a group size and a or s where they differ, as in 4, 4g32 or 8a")
    bits, size, kind = match.groups()
    return Scheme(int(bits), int(size) if size else group_size, kind == "s" if kind else symmetric)


def parse_choices(text: str, group_size: int, symmetric: bool) -> tuple[Scheme, ...]:
    """"2,3,4g32,8a" as schemes. Errors: OptionError."""
    found = tuple(parse_choice(part, group_size, symmetric) for part in text.split(","))
    if len(set(found)) < max(2, len(found)):
        raise OptionError(f"--choices {text}: give at least two, each once")
    return found


def allocate_bits(checkpoint: Checkpoint, options: AllocateOptions, out: Path, progress: Progress | None = None) -> Written:
    """Measure, solve, measure the candidates, and write `out`.

    Errors: OutputError where it exists; OptionError for impossible options and budgets; CheckpointError for a model that cannot be measured.
    """
    progress = progress or quiet()
    _check(checkpoint, options, out)
    groups = groups_of(checkpoint, options.choices[0], options.exclude)
    packed = partial(quantize, checkpoint, format_name=options.format, exclude=options.exclude)
    budget_bits(checkpoint, groups, options.choices, options.budget, packed, options.format)  # what cannot be met is refused before hours of work
    rows, _ = options.calibration.read(checkpoint)
    heldout = rows[HELD_OUT - 1 :: HELD_OUT]
    measured_on = rows[[number for number in range(len(rows)) if number % HELD_OUT != HELD_OUT - 1]]
    if options.candidates > 1 and not len(heldout):
        raise OptionError(f"the calibration text has {len(rows)} windows; give at least {HELD_OUT}, one of which chooses among candidates, or --candidates 1")
    calibration = Calibration(measured_on) if QUANTIZERS[options.method].calibrated else None
    make = partial(
        quantize, checkpoint, method=options.method, options=options.settings, format_name="dense", exclude=options.exclude, device=options.device,
        calibration=calibration,
    )  # fmt: skip
    table = _table(checkpoint, groups, options, make, measured_on, progress)
    result = allocate(
        checkpoint, table, options.budget, packed, options.format, make=make, heldout=heldout if options.candidates > 1 else None,
        count=options.candidates, seed=options.calibration.seed, device=options.device, progress=progress,
    )  # fmt: skip
    choices = [table.choices[choice] for choice in result.chosen.selection]
    write(out, group_schemes(checkpoint, table.groups, choices), {"made": _provenance(table, options, result)})
    return Written(out, table, result)


def _check(checkpoint: Checkpoint, options: AllocateOptions, out: Path) -> None:
    if out.exists() and not options.overwrite:
        raise OutputError(f"{out} exists already; name another output with -o, or replace it with --overwrite")
    for path in (out, *([options.sensitivities] if options.sensitivities else [])):
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if reason := quantized_reason(checkpoint):
        raise OptionError(reason)
    if options.sensitivity not in METHODS:
        raise OptionError(f"--sensitivity {options.sensitivity}: {', '.join(METHODS)}")
    if options.sensitivity == "gram" and options.budget.max_loss is not None:
        raise OptionError("--max-loss is a KL in nats a token, and gram measures errors of outputs; give --sensitivity kl or fisher")
    QUANTIZERS[options.method].options.check(options.settings)


def _table(
    checkpoint: Checkpoint, groups: Sequence[Group], options: AllocateOptions, make: Any, rows: Tensor, progress: Progress
) -> Sensitivities:
    """The sensitivities in the file, or measured now; without the choices that were not asked for."""
    facts = _facts(checkpoint, options)
    if options.sensitivities is not None and options.sensitivities.exists():
        table = Sensitivities.read(options.sensitivities)
        _check_reuse(table, groups, facts, options)
        return table.only(options.choices)
    reference: tuple[int, ...] | None = None
    if options.reference != "dense":
        middle = sorted(options.choices, key=lambda scheme: scheme.bits)[len(options.choices) // 2]
        wanted = options.reference or middle
        if wanted not in options.choices:
            raise OptionError(f"--reference: {wanted} is none of the choices, nor 'dense'")
        reference = (options.choices.index(wanted),) * len(groups)
    table = METHODS[options.sensitivity](
        checkpoint, groups, options.choices, make, rows, reference=reference, device=options.device, progress=progress
    )
    stood = "dense" if table.reference is None else str(options.choices[table.reference[0]])
    table = replace(table, made={**facts, "reference": stood})
    if options.sensitivities is not None:
        table.write(options.sensitivities)
    return table


def _check_reuse(table: Sensitivities, groups: Sequence[Group], facts: Mapping[str, Any], options: AllocateOptions) -> None:
    """Refuse sensitivities of another model, other layers or another quantiser, or without a choice that is asked for."""
    name = f"--sensitivities {options.sensitivities}"
    differ = [key for key in facts if key != "text" and table.made.get(key) != facts[key]]
    if differ or table.groups != tuple(groups):
        what = f"with another {differ[0]}" if differ else "for other layers"
        raise OptionError(f"{name} were measured {what}; measure again, into another file")
    if lost := [choice for choice in options.choices if choice not in table.choices]:
        raise OptionError(f"{name} lack the choice {lost[0]}; they have {'; '.join(map(str, table.choices))}")


def _facts(checkpoint: Checkpoint, options: AllocateOptions) -> dict[str, Any]:
    """What sensitivities follow from."""
    digests = Digests()
    found = {blob.name: blob.digest(digests).result() for blobs in input_files(checkpoint).values() for blob in blobs if blob.name.endswith(".safetensors")}
    digests.stop()
    return {
        "model": {"ref": checkpoint.ref, "sha256": found},
        "quantizer": {"method": options.method, **dict(options.settings)},
        "text": {**options.calibration.model_dump(mode="json", exclude={"sha256"}, exclude_none=True), "sha256": options.calibration.digests()},
        "sensitivity": options.sensitivity,
    }


def facts(written: Written) -> dict[str, Any]:
    """What was allocated, as data."""
    table, result = written.table, written.result
    solution, dual = result.solution, result.solution.objective != result.solution.loss
    offset = 0.0 if dual else table.base  # the objective of the dual is bits
    return {
        "out": str(written.out),
        "candidates": [
            {"candidate": f"{one.origin}{' *' * (one is result.chosen)}", "bits/weight": round(one.cost / result.weights, 4), "predicted KL": one.predicted,
             "measured KL": one.measured}
            for one in result.candidates
        ],
        "objective": solution.objective + offset, "bound": solution.bound + offset, "gap": solution.gap, "proven": solution.proven, "by": solution.by,
        "unit": "bits" if dual else "of summed relative errors" if table.made.get("sensitivity") == "gram" else "nats a token", "fixed": solution.fixed,
        "bits_per_weight": result.bits_per_weight, "file_bytes": result.file_bytes,
        "layers": [
            {"layers": label(group), "scheme": str(table.choices[choice]), "bits": table.choices[choice].bits}
            for group, choice in zip(table.groups, result.chosen.selection, strict=True)
        ],
    }  # fmt: skip


def _provenance(table: Sensitivities, options: AllocateOptions, result: Allocated) -> dict[str, Any]:
    """What bits.yaml says of how it was made."""
    from mergekit_plus import __version__

    chosen, solution = result.chosen, result.solution
    kept = options.budget
    budget = {name: value for name in ("bits_per_weight", "size", "max_loss") if (value := getattr(kept, name)) is not None}
    return {
        "by": f"mergekit-plus {__version__}",
        **table.made,
        "budget": budget,
        "choices": [str(choice) for choice in table.choices],
        "bits_per_weight": round(result.bits_per_weight, 6),
        "file_bytes": result.file_bytes,
        "candidate": chosen.origin,
        "predicted": round(chosen.predicted, 8),
        "measured": None if chosen.measured is None else round(chosen.measured, 8),
        "proven": solution.proven,
        "bound": round(solution.bound + (0 if options.budget.max_loss is not None else table.base), 8),
    }
