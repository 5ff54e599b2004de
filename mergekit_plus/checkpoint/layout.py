"""What a save would do, from headers alone: the files, the units of work and their order, and the memory that they take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..digests import Digests
from ..errors import OptionError
from ..progress import Progress, quiet
from .blob import Blob
from .checkpoint import Checkpoint, FileSource, Rows
from .deferred import Deferred
from .folder import ADAPTER, ADAPTER_CONFIG, PACKED
from .hub import HubFile
from .plan import SLAB, Plan, Step, of_inner, proportional, steps_of
from .prefetch import plan_spans, span_limit
from .scan import Measured
from .shards import Shard, plan_shards
from .upload import Upload

if TYPE_CHECKING:
    from .crew import Crew

MANIFEST = "manifest.json"
HELD = 256 << 20  # bytes of one tensor's inputs that a worker holds, to measure them and compute from them with one reading
FIXED_COST = 64 << 20  # bytes of temporaries that a worker may need beside what it reads and writes
AHEAD = 256 << 20  # bytes fetched from the Hub ahead of their use, where a quarter of the memory is more
DEFAULT_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class SaveOptions:
    """How to save; none of these changes a byte of a tensor."""

    overwrite: bool = False
    max_shard_size: int = DEFAULT_SHARD_SIZE
    memory: int | None = None  # bytes in flight; half of what is free by default
    workers: int | None = None  # one for each core by default
    allow_nonfinite: bool = False
    progress: Progress = field(default_factory=quiet)
    digests: Digests | None = None  # those of the inputs, where hashing has begun already
    job: str | None = None  # what tells this job from others, beside its inputs and shards; one without a name cannot be resumed
    resume: bool = False  # go on with what the same job left when it was interrupted
    upload: Upload | None = None  # each file goes up there when it is finished
    crew: Crew | None = None  # who computes the units, in place of this process' threads


Unit = tuple[Step, Rows | None]  # a step, and the rows of it that are computed at once


@dataclass(frozen=True)
class Layout:
    """What a save would do, known from headers alone."""

    shards: list[Shard]
    units: list[Unit]
    before: list[Measured | Deferred]  # what is measured and computed first, in this order
    bytes_read: int
    bytes_measured: int  # read before that, about, to measure whole models and for long computations
    bytes_written: int
    largest_unit: int
    memory: int
    ahead: int  # bytes of `memory` that hold what is fetched from the Hub ahead of its use; 0 where nothing lies there
    workers: int
    from_hub: tuple[int, int]  # bytes and requests of all that reading, where it is done on the Hub

    @property
    def peak_memory(self) -> int:
        """Bytes in flight at most."""
        return max(min(self.memory, self.ahead + self.workers * self.largest_unit), *(each.memory for each in self.deferred), 0)

    @property
    def deferred(self) -> list[Deferred]:
        """The long computations."""
        return [each for each in self.before if isinstance(each, Deferred)]

    @property
    def disk_needed(self) -> int:
        """Bytes of the output, and of what long computations keep until it is written."""
        return self.bytes_written + sum(each.nbytes for each in self.deferred)


def plan_save(checkpoint: Checkpoint, out: Path, options: SaveOptions) -> Layout:
    """Lay out a save without reading a tensor.

    Errors: OptionError where the memory budget cannot hold the largest unit.
    """
    memory = options.memory or _available_memory() // 2
    workers = options.workers or len(os.sched_getaffinity(0))
    workers = max(1, min(workers, memory // (2 * FIXED_COST)))  # a worker that gets a few rows at a time is no help
    shards = plan_shards(checkpoint.specs.values(), options.max_shard_size, single=_single(checkpoint, out))
    steps = steps_of(checkpoint)
    on_hub = any(isinstance(blob, HubFile) for _, source in file_inputs(checkpoint) for blob, _ in source.places.values())
    steps = _in_order(steps, shards, on_hub)
    ahead = min(memory // 4, AHEAD) if on_hub else 0
    share = (memory - ahead) // workers
    units = [(step, rows) for step in steps for rows in _units(step, share)]
    before = preparations(steps)
    found = [each for each in before if isinstance(each, Measured)]
    deferred = [each for each in before if isinstance(each, Deferred)]
    scanned = [(step, step.slabs()[0]) for measured in found for step in measured.steps]
    first = {id(step): (step, rows) for step, rows in reversed(units)}  # the later units of a step are no larger
    largest, culprit = max(((cost(step, rows), step) for step, rows in (*first.values(), *scanned)), key=lambda pair: pair[0], default=(0, None))
    if culprit is not None and largest > memory - ahead:
        raise OptionError(
            f"--memory {memory / 1e6:.0f} MB is too little: "
            f"{culprit.writes[0].name} needs {largest / 1e6:.0f} MB at once; give at least {'a third more than ' * bool(ahead)}that"
        )
    least = max((each.memory for each in deferred), default=0)
    if least > memory:
        raise OptionError(f"--memory {memory / 1e6:.0f} MB is too little: a block at a time takes {least / 1e6:.0f} MB; give at least that")
    read = sum(_bytes_read(step) for step in steps)
    measured = sum(each.passes * _bytes_read(step) for each in found for step in each.steps)
    measured += sum(each.passes * _bytes_read(step) for each in deferred for part in each.reads for step in steps_of(part))
    written = sum(shard.size for shard in shards)
    return Layout(shards, units, before, read, measured, written, largest, memory, ahead, workers, _from_hub(units, found, ahead))


def _from_hub(units: Iterable[Unit], found: Iterable[Measured], ahead: int) -> tuple[int, int]:
    """Bytes and requests that these units and measurements take where their inputs lie on the Hub."""
    scans = [(each.passes, [(step, rows) for step in each.steps for rows in step.slabs()]) for each in found]
    nbytes = requests = 0
    for times, pieces in ((1, units), *scans) if ahead else ():
        queue, _ = plan_spans((read for piece in pieces for read in reads_of(piece)), span_limit(ahead))
        nbytes, requests = nbytes + times * sum(span.size for span in queue), requests + times * len(queue)
    return nbytes, requests


def _in_order(steps: Iterable[Step], shards: Sequence[Shard], on_hub: bool) -> list[Step]:
    """Steps in the order in which the output has what they write; or, where they read from the Hub, in which the first file there has what they
    read: only a file that is read from its start to its end can be checked against the Hub's SHA-256."""
    place = {name: (number, shard.offsets[name]) for number, shard in enumerate(shards) for name in shard.offsets}

    def key(step: Step) -> tuple[str, int, tuple[int, int]]:
        written = min(place[spec.name] for spec in step.writes)
        read = spans(step, None) if on_hub else ()
        return next(((blob.place, start, written) for blob, start, _ in read if isinstance(blob, HubFile)), ("", 0, written))

    return sorted(steps, key=key)


def spans(step: Step, rows: Rows | None) -> Iterator[tuple[Blob, int, int]]:
    """The bytes of files that a step reads for these rows, through the steps behind it, in that order: file, start, length."""
    through: set[tuple[int, bool]] = set()
    for feed in step.feeds:
        if feed.step is not None and isinstance(feed.take, Tensor) and rows is not None:
            continue  # rows from here and there of what is computed: fetched when they are read
        if feed.step is not None:
            if (id(feed.step), feed.whole) not in through:
                yield from spans(feed.step, of_inner(step, feed.step, rows, feed.whole))
            through.add((id(feed.step), feed.whole))
        elif isinstance(feed.checkpoint.source, FileSource):
            blob, start = feed.checkpoint.source.places[feed.name]
            spec = feed.checkpoint.specs[feed.name]
            own = slice(0, spec.rows)
            if rows is not None and isinstance(feed.take, Tensor):
                dealt = torch.unique(feed.take[rows][feed.take[rows] >= 0])
                if not len(dealt) or int(dealt[-1] - dealt[0]) != len(dealt) - 1:
                    continue  # rows from here and there: fetched when they are read
                own = slice(int(dealt[0]), int(dealt[-1]) + 1)
            elif rows is not None and not feed.whole:
                own = proportional(rows, step.rows, spec.rows)
            yield blob, start + own.start * spec.row_bytes, (own.stop - own.start) * spec.row_bytes


def reads_of(unit: Unit) -> Iterator[tuple[Blob, int, int]]:
    """The bytes of files that a unit reads, slab by slab as it does."""
    step, rows = unit
    for part in step.slabs(rows=rows) if rows is not None else [None]:
        yield from spans(step, part if step.cut else None)


def file_inputs(checkpoint: Checkpoint) -> list[tuple[Checkpoint, FileSource]]:
    """The checkpoints that lie in files, each once, in the order in which they are met."""
    found: dict[int, tuple[Checkpoint, FileSource]] = {}
    seen: set[int] = set()

    def visit(part: Checkpoint) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part.source, FileSource):
            found[id(part)] = (part, part.source)
        elif isinstance(part.source, Plan):
            for step in part.source.steps:
                for inner, _ in step.reads:
                    visit(inner)
        elif isinstance(part.source, Deferred):
            for inner in part.source.reads:
                visit(inner)

    visit(checkpoint)
    return list(found.values())


def preparations(steps: Iterable[Step]) -> list[Measured | Deferred]:
    """Every measurement over whole models, and every long computation, behind these steps; those that others build on first."""
    found: dict[int, Measured | Deferred] = {}
    seen: set[int] = set()

    def visit(step: Step) -> None:
        if id(step) in seen:
            return
        seen.add(id(step))
        visit_behind(step)
        if step.measured is not None and step.measured.whole_model and id(step.measured) not in found:
            for sibling in step.measured.steps:
                visit_behind(sibling)
            found[id(step.measured)] = step.measured

    def visit_behind(step: Step) -> None:
        for feed in step.feeds:
            if feed.step is not None:
                visit(feed.step)
            elif isinstance(source := feed.checkpoint.source, Deferred) and id(source) not in found:
                for part in source.reads:
                    for inner in steps_of(part):
                        visit(inner)
                found[id(source)] = source

    for step in steps:
        visit(step)
    return list(found.values())


def computations(checkpoint: Checkpoint) -> list[Deferred]:
    """The long computations behind a checkpoint, those that others build on first."""
    return [each for each in preparations(steps_of(checkpoint)) if isinstance(each, Deferred)]


def _single(checkpoint: Checkpoint, out: Path) -> str:
    """The name of the one file that must hold everything, where there is one: a file that was asked for, or an adapter's."""
    known = {sidecar: name for name, (*_, sidecar) in PACKED.items()} | {ADAPTER_CONFIG: ADAPTER}
    return out.name if is_file(out) else next((name for file, name in known.items() if file in checkpoint.files), "")


def is_file(out: Path) -> bool:
    """Whether an output is one file, not a folder."""
    return out.suffix == ".safetensors"


def manifest_name(out: Path) -> str:
    """How the manifest of an output is called: in its folder, or beside its file."""
    return f"{out.stem}.{MANIFEST}" if is_file(out) else MANIFEST


def cost(step: Step, rows: Rows | None) -> int:
    """Bytes in memory while a unit is worked on."""
    if rows is not None and step.measures_tensor:  # a slab to measure, or a stretch to compute
        return FIXED_COST + _bytes_held(step, step.slabs()[0])
    return FIXED_COST + _bytes_held(step, rows)


def _units(step: Step, share: int) -> list[Rows | None]:
    """How a step is cut into units for the workers; `share` is one worker's part of the memory."""
    if not step.cut:
        return [None]
    whole = cost(step, None)
    if step.measures_tensor and whole <= min(share, HELD):
        return [None]  # measured and computed from one reading
    if step.measures_tensor or (whole <= share and step.rows * step.row_elements <= SLAB):
        return [slice(0, step.rows)]  # what is measured: read twice, a little at a time, by one worker: the others would wait for the measurement
    fixed = cost(step, slice(0, 0))  # what every unit holds, however few its rows
    row_cost = max(1, (whole - fixed) // max(1, step.rows))
    elements = min(SLAB, max(1, (share - fixed) // row_cost) * step.row_elements)
    return list(step.slabs(elements))


def _bytes_held(step: Step, rows: Rows | None) -> int:
    read = sum(bytes_of(feed.spec.nbytes, step, None if feed.whole else rows) for feed in step.feeds)
    written = sum(bytes_of(spec.nbytes, step, rows) for spec in step.writes)
    return read + written + sum(_bytes_held(inner, of_inner(step, inner, rows, whole)) for inner, whole in step.behind)


def _bytes_read(step: Step) -> int:
    own = sum(feed.spec.nbytes for feed in step.feeds if feed.step is None)
    return own + sum(_bytes_read(inner) for inner, _ in step.behind)


def bytes_of(nbytes: int, step: Step, rows: Rows | None) -> int:
    return nbytes if rows is None else nbytes * (rows.stop - rows.start) // max(1, step.rows)


def _available_memory() -> int:
    return min(_free_memory(), _container_limit())


def _container_limit() -> int:
    """What this container (cgroup) may have."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return 1 << 62


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
