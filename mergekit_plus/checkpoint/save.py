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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..digests import Digests
from ..errors import CheckpointError, OutputError
from .blob import Blob
from .checkpoint import Checkpoint, ParallelMap, Plan, Rows, Step, execute, of_inner, proportional
from .finite import is_finite
from .folder import INDEX
from .inputs import check_target, digest_of, input_files
from .layout import Layout, SaveOptions, Unit, bytes_of, cost, is_file, plan_save, reads_of
from .prefetch import Prefetch
from .shards import ShardFile, index_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What was written and what it was made of: SHA-256 and size of every file."""

    outputs: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        from .. import __version__

        return {"tool": f"mergekit-plus {__version__}", "inputs": self.inputs, "outputs": self.outputs}


Describe = Callable[[Manifest], Mapping[str, bytes]]  # further small files, once the digests are known


def save(checkpoint: Checkpoint, out: Path, options: SaveOptions | None = None, describe: Describe | None = None) -> Manifest:
    """Write a checkpoint to a folder, or to one file where `out` ends in `.safetensors`; all or nothing.

    Errors: OutputError where the output exists or cannot be written; CheckpointError where an input is not what it seemed (cut short,
    changed, not finite). Whatever goes wrong, nothing is left behind and what was there before stays.
    """
    options = options or SaveOptions()
    out = out.resolve()  # a link to a folder on another disk: stage, and rename, there
    check_target(out, options.overwrite, checkpoint)
    layout = plan_save(checkpoint, out, options)
    carried = {} if is_file(out) else {name: checkpoint.file(name) for name in checkpoint.files}
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
    budget = _Budget(layout.memory - layout.ahead)
    ahead = Prefetch(layout.ahead)
    inputs = input_files(checkpoint)
    blobs = [blob for files in inputs.values() for blob in files]
    digests_of = options.digests or Digests()
    files: list[ShardFile] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        with (
            ThreadPoolExecutor(layout.workers, "worker") as workers,
            ThreadPoolExecutor(max(1, layout.workers // 2), "output-digest") as output_pool,
        ):
            parallel = _parallel(workers, stop, budget, ahead)
            try:
                input_digests = {blob.place: blob.digest(digests_of) for blob in blobs}
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
                    found = {blob.place: digest_of(blob, input_digests[blob.place]) for blob in blobs}
            finally:
                stop.set()
                ahead.close()
                if options.digests is None:  # the caller's own may be wanted again
                    digests_of.stop()
                for written in files:
                    written.abandon()
        for blob in blobs:
            blob.check_unchanged()
    finally:
        torch.set_num_threads(threads_before)
        for written in files:
            written.close()
    outputs = {written.shard.name: {"bytes": written.shard.size, "sha256": digest} for written, digest in zip(files, digests, strict=True)}
    return Manifest(outputs, _of_inputs(inputs, found))


def _of_inputs(inputs: Mapping[str, Sequence[Blob]], found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The inputs as the manifest lists them; a small file on the Hub whose digest nobody knows, because it was not read, is none."""
    return {ref: {blob.name: found[blob.place] for blob in files if found[blob.place]["sha256"]} for ref, files in inputs.items()}


def _write_unit(step: Step, rows: Rows | None, where: Mapping[str, ShardFile], options: SaveOptions) -> None:
    for part in step.slabs(rows=rows) if rows is not None else [None]:
        _write_rows(step, part, where, options)


def _write_rows(step: Step, rows: Rows | None, where: Mapping[str, ShardFile], options: SaveOptions) -> None:
    for spec, tensor in zip(step.writes, execute(step, rows), strict=True):
        if not options.allow_nonfinite and spec.is_float and not is_finite(tensor):
            raise CheckpointError(_explain_nonfinite(step, rows, spec.name))
        first = 0 if rows is None else proportional(rows, step.rows, spec.rows).start
        where[spec.name].write(tensor, spec.name, first * spec.row_bytes)
    options.progress.advance(sum(bytes_of(spec.nbytes, step, rows) for spec in step.writes))


def _explain_nonfinite(step: Step, rows: Rows | None, name: str) -> str:
    """Which input brought the value in, or which result is where it arose."""
    for (checkpoint, read), spec in zip(step.reads, step.read_specs, strict=True):
        tensor = checkpoint.read(read, None if rows is None else proportional(rows, step.rows, spec.rows))
        if not tensor.is_floating_point() or is_finite(tensor.to(torch.float64)):
            continue
        if isinstance(checkpoint.source, Plan):
            inner = checkpoint.source.step_of[read]
            return _explain_nonfinite(inner, of_inner(step, inner, rows), read)
        return f"{checkpoint.label}: {read} holds values that are NaN or infinite; mend the model, or carry them with --allow-nonfinite"
    return f"{name}: the result has NaN or infinite values although the inputs have none: it overflows its dtype; try --dtype float32"


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


def _write_small_files(
    carried: Mapping[str, bytes], layout: Layout, out: Path, staged: Path, manifest: Manifest, describe: Describe | None
) -> Manifest:
    """Index, config, tokenizer, and what `describe` adds; the manifest last."""
    small = dict(carried)
    if not is_file(out):
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


def _manifest_name(out: Path) -> str:
    return f"{out.stem}.{MANIFEST}" if is_file(out) else MANIFEST


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
    if is_file(out):
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
