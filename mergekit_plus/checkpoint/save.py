"""The one sink: compute a checkpoint's tensors and write them, all or nothing.

Everything that can be wrong without reading a tensor is wrong before the output is touched. Then workers take units (a run of rows of
one step, or a whole step) in the order of the output files; each reads, computes and writes its unit inside one memory budget, while other
threads hash the inputs and, behind the writers, the outputs. The files are staged beside the target and renamed at the end (stage.py); what is finished
is noted in a journal (journal.py), so that a save that was killed can go on.
The bytes written depend on the checkpoint alone: not on the number of workers, the budget, or the shards of the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from ..digests import Digests
from ..errors import CheckFailed, CompressError, OutputError, ReadError
from ..progress import Progress, quiet
from .blob import Blob
from .checkpoint import Checkpoint, Rows
from .crew import Errand, plan_digest
from .deferred import Deferred, Work
from .hub import HubFile
from .inputs import check_target, digest_of, input_files
from .journal import sync_folder
from .layout import Layout, SaveOptions, Unit, bytes_of, cost, is_file, plan_save, reads_of
from .manifest import Describe, Manifest, input_facts, input_places, write_small_files, written_manifest
from .plan import Step
from .prefetch import Prefetch
from .scan import ParallelMap, Recall
from .shards import Abandoned, ShardFile, known_prefix
from .stage import Stage, was_published
from .units import write_unit, written_by
from .upload import Upload

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
ENVIRONMENT = (OSError, OutputError, ReadError, CheckFailed, KeyboardInterrupt, SystemExit, *OUT_OF_MEMORY)  # what may go better the next time

BATCH = 64 << 20  # bytes that a member of a crew writes before it is heard of again
BATCHES = 16  # at least, where there are so many units: few would leave some members idle at the end

Publish = Callable[[Path, Manifest], None]  # makes a folder visible somewhere else


def save(
    checkpoint: Checkpoint, out: Path, options: SaveOptions | None = None, describe: Describe | None = None, publish: Publish | None = None
) -> Manifest:
    """Write a checkpoint to a folder, or to one file where `out` ends in `.safetensors`; all or nothing.

    With `publish`, which is called when all is written, nothing gets the name `out`: only the partial folder beside it is used, and removed.
    Whatever goes wrong, what was there before stays. A save without `options.job` then leaves nothing behind; one with a job keeps what it has
    finished when the environment failed it, or when it was killed, and `options.resume` goes on from there to the same bytes.
    Errors: OutputError where the output exists or cannot be written; CheckpointError where an input is not what it seemed (cut short,
    changed, not finite).
    """
    options = options or SaveOptions()
    out = out.resolve()  # a link to a folder on another disk: stage, and rename, there
    resume = options.resume and options.job is not None
    if publish is None and not (resume and was_published(out)):
        check_target(out, options.overwrite, checkpoint)
    layout = plan_save(checkpoint, out, options)
    carried = {} if is_file(out) else {name: checkpoint.file(name) for name in checkpoint.files}
    inputs = input_files(checkpoint)
    with Stage(out) as stage:
        try:
            job = None if options.job is None else _fingerprint(options, inputs, layout)
            stage.begin(job, layout.bytes_written, resume, options.overwrite)
            if not stage.done.publishing:
                manifest = _write_all(checkpoint, inputs, layout, stage, options)
                manifest = write_small_files(carried, layout, stage, manifest, describe)
            else:
                manifest = written_manifest(stage)
            if publish is not None:
                publish(stage.files, manifest)
                stage.keep = False
            else:
                if not stage.done.publishing:
                    check_target(out, options.overwrite, checkpoint)  # hours later, it may have come to exist
                stage.publish()
        except BaseException as error:
            told = _explained(error, out, stage.give_up(isinstance(error, ENVIRONMENT)))
            if told is error:
                raise
            raise told from error
    return manifest


def _fingerprint(options: SaveOptions, inputs: Mapping[str, Sequence[Blob]], layout: Layout) -> dict[str, str]:
    """What must be the same for a run to go on where another stopped; by part, so that a refusal can name what differs."""
    from .. import __version__

    parts: dict[str, Any] = {
        "versions": [__version__, torch.__version__],
        "options": [options.job, options.allow_nonfinite],
        "inputs": [[blob.name, blob.identity] for files in inputs.values() for blob in files],
        "shards": [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in layout.shards],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _explained(error: BaseException, out: Path, kept: str) -> BaseException:
    """The error as the user should see it: what happened to the output, what is kept, how to go on."""
    if isinstance(error, OSError):
        return OutputError(f"{out}: {error.strerror or error}; {kept or 'nothing was written'}")
    if not kept:
        return error
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"{out}: {kept}")
    if isinstance(error, CompressError | CheckFailed):
        return type(error)(f"{error}; {kept}")
    return OutputError(f"{out}: out of memory; {kept}, and a smaller --memory") if isinstance(error, OUT_OF_MEMORY) else error


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


def _write_all(checkpoint: Checkpoint, inputs: Mapping[str, Sequence[Blob]], layout: Layout, stage: Stage, options: SaveOptions) -> Manifest:
    """Compute and write every tensor that is not finished; hash inputs and outputs on the way."""
    stop = threading.Event()
    budget = _Budget(layout.memory - layout.ahead)
    ahead = Prefetch(layout.ahead)
    blobs = [blob for files in inputs.values() for blob in files]
    files: list[ShardFile] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        files.extend(_shard_files(layout, stage, options.progress))  # takes their space on the disk: too little of it is known before the work
        digests_of = options.digests or Digests()
        with (
            ThreadPoolExecutor(layout.workers, "worker") as workers,
            ThreadPoolExecutor(max(1, layout.workers // 2), "output-digest") as output_pool,
        ):
            parallel = _parallel(workers, stop, budget, ahead)
            try:
                input_digests = {blob.place: _input_digest(blob, digests_of, stage) for blob in blobs}
                for number, each in enumerate(layout.before):
                    if isinstance(each, Deferred):
                        torch.set_num_threads(threads_before)
                        each.run(_work(str(number), stage, options.progress))
                        torch.set_num_threads(1)
                        continue
                    with options.progress.phase(each.label or "measuring", None):
                        each.get(parallel=parallel, recall=_recall(str(number), stage))
                uploads = options.upload.uploads if options.upload else []
                output_digests = [output_pool.submit(_output_digest, file, stage, options.upload, lambda: _abandon(files, stop)) for file in files]
                where = {name: file for file in files for name in file.shard.offsets}
                units = [unit for unit in layout.units if not _is_finished(*unit, where)]
                done = _bytes_of(layout.units) - _bytes_of(units)
                with options.progress.phase("writing", layout.bytes_written, done=done):

                    def work(unit: Unit) -> None:
                        write_unit(*unit, where, options)

                    if options.crew is None:
                        parallel(work, units)
                    else:
                        _by_crew(checkpoint, layout, units, where, stage, options, stop)
                    wait(output_digests)
                with options.progress.phase("uploading", None) if options.upload else nullcontext():
                    digests = _results(output_digests, uploads)
                with options.progress.phase("checking inputs", None):
                    found = {blob.place: digest_of(blob, input_digests[blob.place]) for blob in blobs}
            finally:
                ahead.close()
                if options.digests is None:  # the caller's own may be wanted again
                    digests_of.stop()
                _abandon(files, stop)
        for blob in blobs:
            blob.check_unchanged()
    finally:
        torch.set_num_threads(threads_before)
        for deferred in layout.deferred:
            deferred.forget()
        for written in files:
            written.close()
    outputs = {written.shard.name: {"bytes": written.shard.size, "sha256": digest} for written, digest in zip(files, digests, strict=True)}
    return Manifest(outputs, input_facts(inputs, found), input_places(inputs, stage.out))


def _shard_files(layout: Layout, stage: Stage, progress: Progress) -> list[ShardFile]:
    """The files to write, each with what an interrupted save has finished of it, if that is still what the journal says."""
    finished = {shard.name: stage.done.shards.pop(shard.name) for shard in layout.shards if shard.name in stage.done.shards}
    stop = threading.Event()

    def advance(amount: int) -> None:
        if stop.is_set():
            raise Abandoned
        progress.advance(amount)

    with progress.phase("checking what is finished", sum(length for length, _ in finished.values())), ThreadPoolExecutor(layout.workers) as pool:
        try:
            prefixes = {name: pool.submit(known_prefix, stage.files / name, *facts, advance) for name, facts in finished.items()}
            known = {name: prefix for name, future in prefixes.items() if (prefix := future.result()) is not None}
        finally:
            stop.set()
    stage.done.shards.update((name, finished[name]) for name in known)
    stage.retain(known)
    there = [*(stage.files / name for name in known), *stage.work.rglob("*.safetensors")]
    needed = layout.disk_needed - sum(path.stat().st_blocks * 512 for path in there)
    free = shutil.disk_usage(stage.files).free
    if needed > free:
        raise OutputError(f"{stage.out.parent}: {needed / 1e9:.2f} GB to write but only {free / 1e9:.2f} GB are free")
    files = [ShardFile(stage.files, shard, known.get(shard.name)) for shard in layout.shards]
    sync_folder(stage.files)
    return files


def _bytes_of(units: Iterable[Unit]) -> int:
    return sum(bytes_of(spec.nbytes, step, rows) for step, rows in units for spec in step.writes)


def _by_crew(
    checkpoint: Checkpoint, layout: Layout, units: Sequence[Unit], where: Mapping[str, ShardFile], stage: Stage, options: SaveOptions, stop: threading.Event
) -> None:
    """Have the units computed elsewhere; what comes back that could not be written there is written here."""
    assert options.crew is not None
    how = replace(options, memory=layout.memory, workers=layout.workers, progress=quiet(), digests=None, upload=None, crew=None)
    inodes = {file.shard.name: os.fstat(file.fd).st_ino for file in where.values()}
    made, memory = [each.made for each in layout.before], layout.largest_unit + BATCH
    errand = Errand(stage.out, how, plan_digest(checkpoint, layout), stage.files, inodes, made, memory)
    wanted = set(map(id, units))
    numbers = [number for number, unit in enumerate(layout.units) if id(unit) in wanted]
    with closing(options.crew.compute(errand, _batches(layout.units, numbers), stop)) as finished:
        for batch, pieces in finished:
            for name, at, data in pieces:
                where[name].put(data, name, at)
            for step, rows in map(layout.units.__getitem__, batch):
                for spec, start, length in written_by(step, rows):
                    where[spec.name].was_put(spec.name, start, length)
                    options.progress.advance(length)


def _batches(units: Sequence[Unit], numbers: Sequence[int]) -> list[list[int]]:
    """The units of these numbers, in order, so many to a batch that they write about `BATCH` bytes, or less where that is much of everything."""
    size = min(BATCH, max(1, _bytes_of(units[number] for number in numbers) // BATCHES))
    batches: list[list[int]] = []
    filled = size
    for number in numbers:
        if filled >= size:
            batches.append([])
            filled = 0
        batches[-1].append(number)
        filled += _bytes_of([units[number]])
    return batches


def _is_finished(step: Step, rows: Rows | None, where: Mapping[str, ShardFile]) -> bool:
    """Whether all that a unit writes lies in what an interrupted save has finished."""
    return all(
        file.shard.offsets[spec.name] + start + length <= file.finished
        for spec, start, length in written_by(step, rows)
        for file in [where[spec.name]]
    )


def _recall(measurement: str, stage: Stage) -> Recall:
    """Gives the results of a measurement's passes as they were, in the order in which they are asked for, and notes new ones."""
    calls = count()

    def recall(compute: Callable[[], Any]) -> Any:
        key = f"{measurement}.{next(calls)}"
        if key not in stage.done.statistics:
            value = compute()
            if stage.journal is None:
                return value
            stage.journal.add(statistic=key, value=value)
        return stage.done.statistics[key]

    return recall


def _work(computation: str, stage: Stage, progress: Progress) -> Work:
    """Where a long computation keeps what it has finished."""
    journal, prefix = stage.journal, f"{computation}/"
    known = {name.removeprefix(prefix): digest for name, digest in stage.done.work.items() if name.startswith(prefix)}
    note = None if journal is None else lambda name, digest: journal.add(work=prefix + name, sha256=digest)
    return Work(stage.work / computation, progress, known, note)


def _input_digest(blob: Blob, digests: Digests, stage: Stage) -> Future[str]:
    """An input's SHA-256; noted in the journal, so that a resumed save need not read the file for it."""
    name = blob.place
    if isinstance(blob, HubFile):  # the Hub has said it
        return blob.digest(digests)
    if name in stage.done.inputs:
        known: Future[str] = Future()
        known.set_result(stage.done.inputs[name])
        return known

    def note(future: Future[str]) -> None:
        if stage.journal is not None and not future.cancelled() and future.exception() is None:
            with suppress(OSError):  # the journal gives it to the next one, who can raise it
                stage.journal.add(input=name, sha256=future.result())

    future = blob.digest(digests)
    future.add_done_callback(note)
    return future


def _output_digest(file: ShardFile, stage: Stage, upload: Upload | None, abandon: Callable[[], None]) -> str:
    """Follow a file as it is written, hash it, note in the journal what is on the disk, and send it up when it is finished."""

    journal = stage.journal
    try:
        digest = file.digest(None if journal is None else lambda position, digest: journal.add(shard=file.shard.name, bytes=position, sha256=digest))
        if upload is not None:
            upload.add(file.path, digest, abandon)
        return digest
    except BaseException:
        abandon()
        raise


def _abandon(files: Iterable[ShardFile], stop: threading.Event) -> None:
    """Begin nothing more, and wait for nothing more."""
    stop.set()
    for file in files:
        file.abandon()


def _results(digests: Iterable[Future[str]], uploads: Iterable[Future[None]]) -> list[str]:
    """The digests, when all is uploaded; of several errors the one that was first in the chain."""
    errors = [error for future in chain[Future[Any]](digests, uploads) if (error := future.exception()) is not None]  # each digest adds an upload
    if errors:
        raise next((error for error in errors if not isinstance(error, Abandoned)), errors[0])
    return [future.result() for future in digests]


def _parallel(pool: ThreadPoolExecutor, stop: threading.Event, budget: _Budget, ahead: Prefetch) -> ParallelMap:
    """A `map` of units over the pool, inside the budget, results in order; after the first error no further unit is begun."""

    def run(function: Callable[[Any], Any], units: Iterable[Any]) -> Iterator[Any]:
        units = list(units)
        ahead.begin(read for unit in units for read in reads_of(unit))

        def guarded(unit: Unit) -> Any:
            with budget.take(cost(*unit)):
                return None if stop.is_set() else function(unit)

        futures: list[Future[Any]] = []
        try:
            futures.extend(pool.submit(guarded, unit) for unit in units)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
            ahead.finish()
        except BaseException:
            stop.set()
            ahead.close()
            raise
        return iter([future.result() for future in futures])

    return run
