"""The one sink: compute a checkpoint's tensors and write them, all or nothing.

Everything that can be wrong without reading a tensor is wrong before the output is touched. Then workers take units (a run of rows of
one step, or a whole step) in the order of the output files; each reads, computes and writes its unit inside one memory budget, while other
threads hash the inputs and, behind the writers, the outputs. The files are staged beside the target and renamed at the end.
The bytes written depend on the checkpoint alone: not on the number of workers, the budget, or the shards of the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..digests import Digests
from ..errors import CheckpointError, OptionError, OutputError
from ..progress import Progress, quiet
from .checkpoint import SLAB, Checkpoint, FileSource, Measured, ParallelMap, Plan, Rows, Step, execute, of_inner, proportional, steps_of
from .finite import is_finite
from .folder import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE
from .safetensors import File
from .shards import Shard, ShardFile, index_json, plan_shards

MANIFEST = "manifest.json"
HELD = 256 << 20  # bytes of one tensor's inputs that a worker holds, to measure them and compute from them with one reading
FIXED_COST = 64 << 20  # bytes of temporaries that a worker may need beside what it reads and writes
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


@dataclass(frozen=True)
class Manifest:
    """What was written and what it was made of: SHA-256 and size of every file."""

    outputs: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        from .. import __version__

        return {"tool": f"mergekit-plus {__version__}", "inputs": self.inputs, "outputs": self.outputs}


Unit = tuple[Step, Rows | None]  # a step, and the rows of it that are computed at once


@dataclass(frozen=True)
class Layout:
    """What a save would do, known from headers alone."""

    shards: list[Shard]
    units: list[Unit]
    measurements: list[Measured]
    bytes_read: int
    bytes_written: int
    largest_unit: int
    memory: int
    workers: int


Describe = Callable[[Manifest], Mapping[str, bytes]]  # further small files, once the digests are known


def plan_save(checkpoint: Checkpoint, out: Path, options: SaveOptions) -> Layout:
    """Lay out a save without reading a tensor.

    Errors: OptionError where the memory budget cannot hold the largest unit.
    """
    memory = options.memory or _available_memory() // 2
    workers = options.workers or len(os.sched_getaffinity(0))
    workers = max(1, min(workers, memory // (2 * FIXED_COST)))  # a worker that gets a few rows at a time is no help
    shards = plan_shards(checkpoint.specs.values(), options.max_shard_size, single=_single(checkpoint, out))
    place = {name: (number, shard.offsets[name]) for number, shard in enumerate(shards) for name in shard.offsets}
    steps = sorted(steps_of(checkpoint), key=lambda step: min(place[spec.name] for spec in step.writes))
    share = memory // workers
    units = [(step, rows) for step in steps for rows in _units(step, share)]
    found = measurements(steps)
    scanned = [(step, step.slabs()[0]) for measured in found for step in measured.steps]
    largest, culprit = max(((_cost(step, rows), step) for step, rows in (*units, *scanned)), key=lambda pair: pair[0], default=(0, None))
    if culprit is not None and largest > memory:
        raise OptionError(
            f"--memory {memory / 1e6:.0f} MB is too little: "
            f"{culprit.writes[0].name} needs {largest / 1e6:.0f} MB at once; give at least that"
        )
    read = sum(_bytes_read(step) for step in steps)
    return Layout(shards, units, found, read, sum(shard.size for shard in shards), largest, memory, workers)


def save(checkpoint: Checkpoint, out: Path, options: SaveOptions | None = None, describe: Describe | None = None) -> Manifest:
    """Write a checkpoint to a folder, or to one file where `out` ends in `.safetensors`; all or nothing.

    Errors: OutputError where the output exists or cannot be written; CheckpointError where an input is not what it seemed (cut short,
    changed, not finite). Whatever goes wrong, nothing is left behind and what was there before stays.
    """
    options = options or SaveOptions()
    out = out.resolve()  # a link to a folder on another disk: stage, and rename, there
    check_target(out, options.overwrite, checkpoint)
    layout = plan_save(checkpoint, out, options)
    carried = {} if _is_file(out) else {name: checkpoint.file(name) for name in checkpoint.files}
    with _staging(out) as staged:
        free = shutil.disk_usage(staged).free
        if layout.bytes_written > free:
            raise OutputError(f"{out.parent}: {layout.bytes_written / 1e9:.2f} GB to write but only {free / 1e9:.2f} GB are free")
        try:
            manifest = _write_all(checkpoint, layout, staged, options)
            manifest = _write_small_files(carried, layout, out, staged, manifest, describe)
            check_target(out, options.overwrite, checkpoint)  # hours later, it may have come to exist
            _publish(staged, out)
        except OSError as error:
            raise OutputError(f"{out}: {error.strerror or error}; nothing was written") from error
    return manifest


def check_target(out: Path, overwrite: bool, checkpoint: Checkpoint) -> None:
    """Refuse an output that exists (unless it may be replaced and is nothing but a model), or that is an input or holds one.

    Errors: OutputError.
    """
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist")
    paths = [path for files in input_files(checkpoint).values() for path in files]
    inputs = {place for path in paths for place in (path.resolve(), path.parent.resolve() / path.name)}  # the Hub's cache links to blobs
    resolved = out.resolve()
    if any(resolved in (path, *path.parents) for path in inputs):
        raise OutputError(f"{out} is one of the inputs, or holds one; write somewhere else with -o")
    if not out.exists():
        return
    if _is_file(out) != out.is_file():
        raise OutputError(f"{out} is a {'file' if out.is_file() else 'folder'}; an output is a folder, or a file that ends in .safetensors")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; name another output with -o, or replace it with --overwrite")
    if out.is_dir() and not any((out / name).is_file() for name in (SINGLE, INDEX, ADAPTER)):
        raise OutputError(f"{out} is a folder without a model in it; --overwrite replaces models only")
    if out.is_dir() and (inner := next((path.name for path in out.iterdir() if path.is_dir()), None)):
        raise OutputError(f"{out} holds the folder {inner}, which --overwrite would delete; move it away, or name another output with -o")


def measurements(steps: Iterable[Step]) -> list[Measured]:
    """Every measurement over whole models behind these steps, those that others build on first."""
    found: dict[int, Measured] = {}
    seen: set[int] = set()

    def visit(step: Step) -> None:
        if id(step) in seen:
            return
        seen.add(id(step))
        for inner, _ in step.behind:
            visit(inner)
        if step.measured is not None and step.measured.whole_model and id(step.measured) not in found:
            for sibling in step.measured.steps:
                for inner, _ in sibling.behind:
                    visit(inner)
            found[id(step.measured)] = step.measured

    for step in steps:
        visit(step)
    return list(found.values())


def input_files(checkpoint: Checkpoint) -> dict[str, list[Path]]:
    """The files behind a checkpoint, under the label of the input that they belong to."""
    found: dict[str, dict[Path, None]] = {}
    for part, source in _inputs(checkpoint):
        files = found.setdefault(part.label, {})
        files.update({file.path: None for file, _ in source.places.values()})
        files.update({path: None for path in part.files.values() if isinstance(path, Path)})
    return {label: sorted(files) for label, files in found.items()}


def _inputs(checkpoint: Checkpoint) -> list[tuple[Checkpoint, FileSource]]:
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

    visit(checkpoint)
    return list(found.values())


def _open_files(checkpoint: Checkpoint) -> dict[Path, File]:
    """The files behind a checkpoint: those that its tensors are read from, as they are open now, and the small ones."""
    files = {file.path: file for _, source in _inputs(checkpoint) for file, _ in source.places.values()}
    return files | {path: File(path) for paths in input_files(checkpoint).values() for path in paths if path not in files}


def _units(step: Step, share: int) -> list[Rows | None]:
    """How a step is cut into units for the workers; `share` is one worker's part of the memory."""
    if not step.cut:
        return [None]
    if step.measures_tensor and _cost(step, None) <= min(share, HELD):
        return [None]  # measured and computed from one reading
    if step.measures_tensor:
        return [slice(0, step.rows)]  # read twice, a little at a time, by one worker: the others would wait for the measurement
    fixed = _cost(step, slice(0, 0))  # what every unit holds, however few its rows
    row_cost = max(1, (_cost(step, None) - fixed) // max(1, step.rows))
    elements = min(SLAB, max(1, (share - fixed) // row_cost) * step.row_elements)
    return list(step.slabs(elements))


def _cost(step: Step, rows: Rows | None) -> int:
    """Bytes in memory while a unit is worked on."""
    if rows is not None and step.measures_tensor:  # a slab to measure, or a stretch to compute
        return FIXED_COST + _bytes_held(step, step.slabs()[0])
    return FIXED_COST + _bytes_held(step, rows)


def _bytes_held(step: Step, rows: Rows | None) -> int:
    read = sum(_part(feed.spec.nbytes, step, None if feed.whole else rows) for feed in step.feeds)
    written = sum(_part(spec.nbytes, step, rows) for spec in step.writes)
    return read + written + sum(_bytes_held(inner, of_inner(step, inner, rows, whole)) for inner, whole in step.behind)


def _bytes_read(step: Step) -> int:
    own = sum(feed.spec.nbytes for feed in step.feeds if feed.step is None)
    return own + sum(_bytes_read(inner) for inner, _ in step.behind)


def _part(nbytes: int, step: Step, rows: Rows | None) -> int:
    return nbytes if rows is None else nbytes * (rows.stop - rows.start) // max(1, step.rows)


class _Budget:
    """Bytes that may be in flight; what is larger than all of them is let in alone, so that nobody waits for ever."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._freed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        amount = min(amount, self.total)
        with self._freed:
            self._freed.wait_for(lambda: amount <= self.free)
            self.free -= amount
        try:
            yield
        finally:
            with self._freed:
                self.free += amount
                self._freed.notify_all()


def _write_all(checkpoint: Checkpoint, layout: Layout, staged: Path, options: SaveOptions) -> Manifest:
    """Compute and write every tensor; hash inputs and outputs on the way."""
    stop = threading.Event()
    budget = _Budget(layout.memory)
    inputs = _open_files(checkpoint)
    digests_of = options.digests or Digests()
    files: list[ShardFile] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        with (
            ThreadPoolExecutor(layout.workers, "worker") as workers,
            ThreadPoolExecutor(max(1, layout.workers // 2), "output-digest") as output_pool,
        ):
            parallel = _parallel(workers, stop, budget)
            try:
                input_digests = {path: digests_of.of(file.fd) for path, file in inputs.items()}
                for measured in layout.measurements:
                    with options.progress.phase(measured.label or "measuring", None):
                        measured.get(parallel=parallel)
                files.extend(ShardFile(staged, shard) for shard in layout.shards)
                output_digests = [output_pool.submit(file.digest) for file in files]
                where = {name: file for file in files for name in file.shard.offsets}
                with options.progress.phase("writing", layout.bytes_written):

                    def work(unit: Unit) -> None:
                        _write_unit(*unit, where, options)

                    parallel(work, layout.units)
                    digests = [future.result() for future in output_digests]
                with options.progress.phase("checking inputs", None):
                    found = {path: {"bytes": inputs[path].size, "sha256": _digest(path, future)} for path, future in input_digests.items()}
            finally:
                stop.set()
                if options.digests is None:  # the caller's own may be wanted again
                    digests_of.stop()
                for written in files:
                    written.abandon()
        for file in inputs.values():
            file.check_unchanged()
    finally:
        torch.set_num_threads(threads_before)
        for written in files:
            written.close()
    outputs = {written.shard.name: {"bytes": written.shard.size, "sha256": digest} for written, digest in zip(files, digests, strict=True)}
    return Manifest(outputs, {label: {path.name: found[path] for path in paths} for label, paths in input_files(checkpoint).items()})


def _digest(path: Path, future: Future[str]) -> str:
    try:
        return future.result()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read to its end: {error.strerror}") from None


def _write_unit(step: Step, rows: Rows | None, where: Mapping[str, ShardFile], options: SaveOptions) -> None:
    for part in step.slabs(SLAB, rows) if rows is not None else [None]:
        _write_rows(step, part, where, options)


def _write_rows(step: Step, rows: Rows | None, where: Mapping[str, ShardFile], options: SaveOptions) -> None:
    for spec, tensor in zip(step.writes, execute(step, rows), strict=True):
        if not options.allow_nonfinite and spec.is_float and not is_finite(tensor):
            raise CheckpointError(_explain_nonfinite(step, rows, spec.name))
        first = 0 if rows is None else proportional(rows, step.rows, spec.rows).start
        where[spec.name].write(tensor, spec.name, first * spec.row_bytes)
    options.progress.advance(sum(_part(spec.nbytes, step, rows) for spec in step.writes))


def _explain_nonfinite(step: Step, rows: Rows | None, name: str) -> str:
    """Which input brought the value in, or which result is where it arose."""
    for feed in step.feeds:
        whole = rows is None or feed.take is not None
        tensor = feed.checkpoint.read(feed.name, None if rows is None or whole else proportional(rows, step.rows, feed.spec.rows))
        if not tensor.is_floating_point() or is_finite(tensor.to(torch.float64)):
            continue
        if feed.step is not None:
            return _explain_nonfinite(feed.step, of_inner(step, feed.step, rows, whole), feed.name)
        return f"{feed.checkpoint.label}: {feed.name} holds values that are NaN or infinite; mend the model, or carry them with --allow-nonfinite"
    return f"{name}: the result has NaN or infinite values although the inputs have none: it overflows its dtype; try --dtype float32"


def _parallel(pool: ThreadPoolExecutor, stop: threading.Event, budget: _Budget) -> ParallelMap:
    """A `map` of units over the pool, inside the budget, results in order; after the first error no further unit is begun."""

    def run(function: Callable[[Any], Any], units: Iterable[Any]) -> Iterator[Any]:
        def guarded(unit: Unit) -> Any:
            with budget.take(_cost(*unit)):
                return None if stop.is_set() else function(unit)

        futures: list[Future[Any]] = []
        try:
            futures.extend(pool.submit(guarded, unit) for unit in units)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
        except BaseException:
            stop.set()
            raise
        return iter([future.result() for future in futures])

    return run


def _write_small_files(
    carried: Mapping[str, bytes], layout: Layout, out: Path, staged: Path, manifest: Manifest, describe: Describe | None
) -> Manifest:
    """Index, config, tokenizer, and what `describe` adds; the manifest last."""
    small = dict(carried)
    if not _is_file(out):
        if len(layout.shards) > 1:
            small[INDEX] = json.dumps(index_json(layout.shards), indent=2).encode() + b"\n"
        small |= describe(manifest) if describe else {}
    outputs = dict(manifest.outputs)
    for name, content in small.items():
        _write_file(staged / name, content)
        outputs[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = Manifest(outputs, manifest.inputs)
    _write_file(staged / _manifest_name(out), json.dumps(manifest.as_json(), indent=2).encode() + b"\n")
    return manifest


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _single(checkpoint: Checkpoint, out: Path) -> str:
    """The name of the one file that must hold everything, where there is one: a file that was asked for, or an adapter's."""
    return out.name if _is_file(out) else ADAPTER if ADAPTER_CONFIG in checkpoint.files else ""


def _is_file(out: Path) -> bool:
    return out.suffix == ".safetensors"


def _manifest_name(out: Path) -> str:
    return f"{out.stem}.{MANIFEST}" if _is_file(out) else MANIFEST


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, however it ends."""
    try:
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out.parent}: {error.strerror}; choose an output folder that can be written, with -o") from None
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, out: Path) -> None:
    """Rename the staged files to their final names; what was there before gives way only now."""
    if _is_file(out):
        os.replace(staged / out.name, out)
        os.replace(staged / _manifest_name(out), out.parent / _manifest_name(out))
    else:
        staged.chmod(0o777 & ~_umask())
        _sync_folder(staged)
        if out.exists():
            old = staged.with_suffix(".old")
            os.replace(out, old)
            try:
                os.replace(staged, out)
            except BaseException:
                os.replace(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(staged, out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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


