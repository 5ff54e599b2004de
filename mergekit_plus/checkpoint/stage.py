"""The folder `.<name>.partial` beside an output, in which it comes into being.

    lock      held by the process that writes; says which one that is
    journal   what is finished, where the save may be resumed
    files/    the shards and small files: what becomes the output
    work/     what long computations have finished
    old/      what is being replaced, between the two renames of publishing

Readers of the output see the old one, for a moment none, then the new one. A process that is killed leaves this folder and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from .journal import Done, Journal, read, sync_folder
from .layout import is_file, manifest_name

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def partial_of(out: Path) -> Path:
    """Where an output is made."""
    return out.parent / f".{out.name}.partial"


def was_published(out: Path) -> bool:
    """Whether a run was killed after its output had got its name and before everything was tidy."""
    files = partial_of(out) / "files"
    staged = files / out.name if is_file(out) else files
    return out.exists() and not staged.exists() and read(partial_of(out) / "journal").publishing


def refuse_leftover(out: Path) -> None:
    """Refuse, before long work, to begin where an interrupted run has finished something. Errors: OutputError."""
    found = read(partial_of(out) / "journal")
    if found.worth_keeping:
        raise OutputError(f"{out}: {_refusal(found, found.job)}")


class Stage:
    """An output's partial folder, while this process holds its lock; on exit it is gone, unless `keep` says otherwise.

    Errors: OutputError where the folder cannot be made, or another process is writing this output.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, partial_of(out)
        self.files, self.old, self.work = self.folder / "files", self.folder / "old", self.folder / "work"
        self.journal: Journal | None = None
        self.done = Done()
        self.keep = True  # until `begin` has looked whose work is in it
        try:
            self._lock = _locked(self.folder, out)
        except OSError as error:
            raise OutputError(f"{out.parent}: {error.strerror}; choose an output folder that can be written, with -o") from None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal is not None:
            self.journal.close()
        if not self.keep:
            self._clear()
            with suppress(OSError):  # the lock goes last: whoever takes a new one finds an empty folder, or makes one
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self._lock)

    def begin(self, job: Mapping[str, str] | None, total: int, resume: bool, overwrite: bool) -> None:
        """Take the folder into use: go on with what the same job left there, or start from nothing.

        job: the parts of its fingerprint; None for a save that cannot be resumed. total: bytes of all shards.
        Errors: OutputError where it holds finished work that was not asked to be continued, or that is another job's.
        """
        found = read(self.folder / "journal")
        self.keep = found.worth_keeping
        if found.worth_keeping and not overwrite | resume:
            raise OutputError(f"{self.out}: {_refusal(found, job)}")
        resumed = found.worth_keeping and resume
        if resumed and found.job != job:
            raise OutputError(f"{self.out}: {_refusal(found, job)}")
        if not resumed:
            self._clear()
            self.keep = False
            found = Done(dict(job or {}), total)
        if not found.publishing:  # else there is none any more, where it has become the output
            self.files.mkdir(exist_ok=True)
        self.done = found
        if job is not None:
            self.journal = Journal(self.folder / "journal", found)

    def retain(self, names: Collection[str]) -> None:
        """Delete whatever else lies among the files."""
        for path in self.files.iterdir():
            if path.name not in names:
                path.unlink()

    def give_up(self, environment: bool) -> str:
        """Decide whether what is finished stays: after a failure of the environment, not after a refusal. Says what stays and how to go on."""
        if self.journal is None:
            return ""
        self.keep = environment and self.done.worth_keeping and (self.folder / "journal").exists()
        return f"{self.done.amount} are kept, go on with --resume" if self.keep else ""

    def publish(self) -> None:
        """Rename the files to their final names; what was there before gives way only now. Does what is left of it after a kill."""
        if self.journal is not None and not self.done.publishing:
            self.journal.add(publishing=True)
        if is_file(self.out):
            for name in (self.out.name, manifest_name(self.out)):  # a file comes before the manifest that vouches for it
                if (self.files / name).exists():
                    os.replace(self.files / name, self.out.parent / name)
        elif (self.files / manifest_name(self.out)).exists():  # all is there
            self._replace()
        sync_folder(self.folder)
        sync_folder(self.out.parent)
        self.keep = False

    def _replace(self) -> None:
        if not self.out.exists():
            os.replace(self.files, self.out)
            return
        shutil.rmtree(self.old, ignore_errors=True)
        os.replace(self.out, self.old)
        try:
            os.replace(self.files, self.out)
        except BaseException:
            os.replace(self.old, self.out)
            raise

    def _clear(self) -> None:
        """Delete everything but the lock; an output that was set aside and never replaced is put back."""
        if self.old.exists() and not self.out.exists():
            os.replace(self.old, self.out)
        for name in ("journal", "journal.new"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.files, self.old, self.work):
            shutil.rmtree(folder, ignore_errors=True)


def _refusal(found: Done, job: Mapping[str, str] | None) -> str:
    """Why a run cannot just begin where another has finished work."""
    if found.job == job:
        return f"an interrupted run finished {found.amount}; continue it with --resume, or start over with --overwrite"
    other = " and ".join(name for name in found.job if job is not None and job.get(name) != found.job[name]) or "options"
    way = "continue that one, name another output with -o, or discard its work with --overwrite alone"
    return f"an interrupted run with other {other} finished {found.amount}, which this one cannot use; {way}"


def _locked(folder: Path, out: Path) -> int:
    """Make the folder and lock it."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        if folder.is_symlink():
            raise OSError(errno.ENOTDIR, f"{folder.name} is a link")
        try:
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # its owner has just removed the folder
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(fd, 200, 0).decode(errors="replace") or "another process"
            os.close(fd)
            raise OutputError(f"{out}: {who} is writing it; wait until it has ended, or name another output with -o") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(fd)
                raise
            warnings.warn(f"{folder.parent} cannot lock files: make sure that no second run writes {out.name}", stacklevel=2)
        if _is_at(fd, folder / "lock"):
            break
        os.close(fd)  # its owner removed it between our open and our lock
    with suppress(OSError):  # a courtesy to whoever comes second
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},".encode())
    return fd


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
