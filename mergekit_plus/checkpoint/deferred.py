"""Tensors that one long computation makes, a calibrated or a trained one: known by name and shape before, computed when they are first needed.

    def compute(work: Work) -> None:
        for block in blocks:
            work.part(block.name, lambda: compressed(block))        # {name: tensor}, written to a file of its own

    Checkpoint("calibrated", Deferred(specs, [model], compute))

What is finished lies in files, not in memory. `save` has them in the output's partial folder, where they outlive a kill; a read outside of a
save, to evaluate what does not exist yet, has them in a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..progress import Progress, quiet
from .blob import Blob
from .checkpoint import Checkpoint, FileSource, Rows
from .folder import open_checkpoint
from .journal import sync_folder
from .spec import TensorSpec

Note = Callable[[str, str], None]  # takes down the name of a finished file and its SHA-256


class Work:
    """What a computation is given: a folder that outlives a kill, and somebody to tell how far it is."""

    def __init__(self, folder: Path, progress: Progress | None = None, known: Mapping[str, str] | None = None, note: Note | None = None) -> None:
        """`known`: the SHA-256 of the files that an interrupted run had finished."""
        self.folder, self.progress = folder, progress or quiet()
        self.parts: list[str] = []
        self._known, self._note = dict(known or {}), note
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Checkpoint:
        """Some of the tensors, under a name of their own; computed now unless an interrupted run had finished them."""
        file = f"{name}.safetensors"
        if not self.has(file):
            save_file({key: tensor.contiguous() for key, tensor in compute().items()}, self.folder / file)
            self.keep(file)
        self.parts.append(file)
        return open_checkpoint(self.folder / file)

    def keep(self, file: str) -> None:
        """Take down that this file in the folder is finished: a run that goes on will find it, unless it is no longer the same."""
        path = self.folder / file
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        sync_folder(self.folder)
        self._known[file] = digest
        if self._note is not None:
            self._note(file, digest)

    def has(self, file: str) -> bool:
        """Whether this file was finished, by this run or by one before it, and is as it was then."""
        try:
            with (self.folder / file).open("rb") as stream:
                return file in self._known and hashlib.file_digest(stream, "sha256").hexdigest() == self._known[file]
        except FileNotFoundError:
            return False


class Deferred:
    """A source whose tensors one computation makes, all of them, when one is first read.

    reads: the checkpoints that it reads, each once or `passes` times. memory: bytes that it needs at least. The parts that `compute` gives to its
    `Work` must hold exactly the tensors of `specs`.
    """

    def __init__(
        self, specs: Iterable[TensorSpec], reads: Sequence[Checkpoint], compute: Callable[[Work], None], *, memory: int = 0, passes: int = 1
    ) -> None:
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in specs}
        self.reads, self.compute, self.memory, self.passes = tuple(reads), compute, memory, passes
        self._lock = threading.Lock()
        self._made: FileSource | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the disk while its tensors wait to be read."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        return self.run().read(name, rows)

    def run(self, work: Work | None = None, progress: Progress | None = None) -> FileSource:
        """Compute now, if that is not done, in the folder of `work` (by default in a temporary one); the files are used until `forget`.

        Errors: CheckpointError where the computation yields other tensors than it said; whatever it raises.
        """
        with self._lock:
            if self._made is None:
                if work is None:
                    work = Work(Path(tempfile.mkdtemp(prefix="compress-")), progress)
                    weakref.finalize(self, shutil.rmtree, work.folder, ignore_errors=True)
                self.compute(work)
                self._made = self._source([work.folder / file for file in work.parts])
            return self._made

    @property
    def made(self) -> list[Path]:
        """The files; for `adopt` of the same computation in another process."""
        return list(dict.fromkeys(Path(blob.place) for blob, _ in self.run().places.values()))

    def adopt(self, made: Sequence[Path]) -> None:
        """Take the files as they were computed elsewhere."""
        with self._lock:
            self._made = self._source(made)

    def forget(self) -> None:
        """The files are gone, or will be: a later read computes again."""
        with self._lock:
            self._made = None

    def _source(self, files: Iterable[Path]) -> FileSource:
        specs: dict[str, TensorSpec] = {}
        places: dict[str, tuple[Blob, int]] = {}
        for file in files:
            part = open_checkpoint(file).source
            assert isinstance(part, FileSource)
            specs |= part.specs
            places |= part.places
        if specs != self.specs:
            wrong = sorted(name for name in specs.keys() | self.specs.keys() if specs.get(name) != self.specs.get(name))
            raise CheckpointError(f"a computation made {specs.get(wrong[0])}, not {self.specs.get(wrong[0])}; {len(wrong)} tensors are not as planned")
        return FileSource(self.specs, places)
