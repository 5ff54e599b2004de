"""A repository on the Hub as an output: each shard goes up when it is finished, and one commit makes all of it visible.

Where the branch stands is remembered before the work begins, and the commit is made on top of that or not at all: nobody's commit in between is lost.
What went up before a failure is not sent again: the Hub knows large files by their SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatch
from logging import ERROR
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CompressError, OptionError, OutputError, printable
from .folder import CARRIED
from .hub import PATIENCE
from .ranges import LONGEST_WAIT, again_after, passes, transport_errors

AT_ONCE = 2  # files that go up at the same time
SILENCE = 120.0  # seconds without a byte, in or out, after which a connection is given up; the Hub takes long for a large commit
PAUSES = (1, 2, 4, 8)  # seconds between tries, beside those that huggingface_hub itself makes of most requests
UNTOUCHED = (".gitattributes",)  # what a repository holds from the start
# What a model consists of: where a new version lacks such a file, that of the old one is deleted with the same commit.
OF_A_MODEL = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "manifest.json", "recipe.yaml", *CARRIED)

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A branch of a repository."""

    repo: str
    branch: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.repo}{'' if self.branch == 'main' else f'@{self.branch}'}"

    @property
    def folder(self) -> Path:
        """The local folder beside which it is made."""
        return Path(self.repo.partition("/")[2].removesuffix(".safetensors"))


def parse_target(text: str, bare: bool = False) -> Target | None:
    """`hf://org/name[@branch]` as a target, None for another kind of output; with `bare`, `org/name` is one too.

    Errors: OptionError for what begins as one and is none.
    """
    rest = re.sub("^hf:/{1,2}", "", text)  # a path has lost one of the slashes
    if rest == text and not bare:
        return None
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", rest)
    if match is None or ".." in rest:
        raise OptionError(f"hf://{rest} does not name a repository to write to; write hf://org/name or hf://org/name@branch")
    return Target(match[1], match[2] or "main")


class Upload:
    """What goes up to a target. `begin` first, then `add` for each finished file, in the end `commit`.

    Errors, of all of them: OutputError in one line, without tokens and signed links.
    """

    def __init__(self, target: Target, private: bool = False) -> None:
        from huggingface_hub import HfApi

        from .. import __version__

        self.target, self.private = target, private
        self.uploads: list[Future[None]] = []  # one for each file that was added
        self._api = HfApi(library_name="mergekit-plus", library_version=__version__)
        self._head = ""  # where the branch stands when the work begins
        self._landed = False  # whether an interrupted run's commit was made
        self._operations: dict[str, Any] = {}
        self._slots = threading.Semaphore(AT_ONCE)
        self._stop = threading.Event()

    def __enter__(self) -> Upload:
        from huggingface_hub import get_session, set_client_factory
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, logging  # type: ignore[attr-defined]

        self._shown = logging.get_verbosity(), not are_progress_bars_disabled()
        logging.set_verbosity(ERROR)  # its warnings name signed links, and its bars would be drawn over ours
        disable_progress_bars()
        self._impatient = get_session().timeout.read is None  # as it comes: a server that falls silent would be waited for for ever
        if self._impatient:
            set_client_factory(_impatient_client)
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import enable_progress_bars, logging  # type: ignore[attr-defined]
        from huggingface_hub.utils._http import default_client_factory

        self._stop.set()  # a file that is on its way is not waited for: its thread ends with the process
        if self._impatient:
            set_client_factory(default_client_factory)
        verbosity, bars = self._shown
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()

    def check(self, overwrite: bool, staged: Path | None = None) -> None:
        """Refuse a repository with anything in it, unless it may be replaced, or holds already what an interrupted run has `staged`."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def look() -> None:
            try:
                self._head = self._where()
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return
            files = self._files(self._head)
            if overwrite or not files.keys() - set(UNTOUCHED):
                return
            self._landed = staged is not None and _holds(files, staged)
            if not self._landed:
                raise OutputError(f"{self.target} is not empty; name another repository or branch, or replace the model in it with --overwrite")

        self._patiently(look)

    def begin(self, overwrite: bool, staged: Path | None = None) -> None:
        """Make sure, before any work, that the target exists, may be written to and is free; remember where it stands."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        def open_() -> None:
            try:
                self._api.auth_check(self.target.repo, write=True)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                self._api.create_repo(self.target.repo, private=True if self.private else None, exist_ok=True)
            if self.private and not self._api.repo_info(self.target.repo, timeout=PATIENCE).private:
                raise OutputError(f"{self.target} is public; without --private it is written to all the same, or make it private in its settings first")
            try:
                self._where()
            except RevisionNotFoundError:
                self._api.create_branch(self.target.repo, branch=self.target.branch, exist_ok=True)

        self._patiently(open_)
        self.check(overwrite, staged)

    def add(self, path: Path, sha256: str, failed: Callable[[], None]) -> None:
        """Send a file up in the background; `failed` is called when that cannot be done."""
        future: Future[None] = Future()
        self.uploads.append(future)

        def send() -> None:
            with self._slots:
                try:
                    if not self._stop.is_set():
                        self._send(path, sha256)
                    future.set_result(None)
                except BaseException as error:
                    future.set_exception(error)
                    failed()

        threading.Thread(target=send, name=f"upload-{path.name}", daemon=True).start()

    def commit(self, folder: Path, digests: Mapping[str, str], manifest: str) -> str:
        """Make the files of a folder, and no other model's, visible at once; returns the commit. `digests` are those of all but the manifest."""
        from huggingface_hub import CommitOperationDelete

        for name, digest in digests.items():
            if name not in self._operations or self._operations[name].path_or_fileobj != b"":  # not sent as a large file
                self._operations[name] = _operation(folder / name, digest)
        self._operations[manifest] = _operation(folder / manifest)

        def once() -> str:
            head = self._where()
            files = self._files(head)
            if (self._landed or head != self._head) and _holds(files, folder / manifest):  # the latter: a try whose answer was lost
                return head
            stale = [name for name in files if any(fnmatch(name, known) for known in OF_A_MODEL) and name not in self._operations]
            operations = [*self._operations.values(), *(CommitOperationDelete(name) for name in stale)]
            message = "Upload a model with mergekit-plus"
            return str(
                self._api.create_commit(
                    self.target.repo, operations, commit_message=message, revision=self.target.branch, parent_commit=self._head
                ).oid
            )

        commit = self._patiently(once)
        self._patiently(lambda: self._check_published(commit, folder, digests))
        return commit

    def _send(self, path: Path, sha256: str) -> None:
        operation = _operation(path, sha256)
        self._patiently(lambda: self._api.preupload_lfs_files(self.target.repo, [operation], revision=self.target.branch))
        self._operations[path.name] = operation

    def _where(self) -> str:
        """The commit that the branch points at."""
        return str(self._api.repo_info(self.target.repo, revision=self.target.branch, timeout=PATIENCE).sha)

    def _files(self, commit: str) -> dict[str, Any]:
        """The files at the top of the repository."""
        return {entry.path: entry for entry in self._api.list_repo_tree(self.target.repo, revision=commit) if hasattr(entry, "blob_id")}

    def _check_published(self, commit: str, folder: Path, digests: Mapping[str, str]) -> None:
        files = self._files(commit)
        for name, digest in digests.items():
            if name not in files or not _is(files[name], folder / name, digest):
                raise OutputError(f"{self.target}: commit {commit[:7]} does not have {name} as it was written; look at the repository, and try again")

    def _patiently(self, once: Callable[[], T]) -> T:
        """What `once` returns; tried again after what may pass."""
        for pause in (*PAUSES, None):
            try:
                return once()
            except CompressError:
                raise
            except Exception as error:
                asked = None if pause is None else _pause(error, pause)
                if asked is None or self._stop.is_set():
                    raise self._explained(error) from None
                time.sleep(asked)
        raise AssertionError("unreachable")

    def _explained(self, error: Exception) -> OutputError:
        """One line for whatever huggingface_hub, or the HTTP library of the day, raises."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        error = _cause(error)
        if isinstance(error, OfflineModeIsEnabled):
            return OutputError(f"{self.target} cannot be written to while HF_HUB_OFFLINE is set")
        if isinstance(error, HfHubHTTPError):
            status, told = error.response.status_code, f" ({_clean(error.server_message)})" if error.server_message else ""
            if status in (401, 403):
                return OutputError(f"{self.target}: the Hub does not let you write there: {status}{told}; `hf auth login` with a token that may")
            if status == 412:
                return OutputError(f"{self.target}: somebody else committed to {self.target.branch} meanwhile; nothing was published")
            return OutputError(f"{self.target}: the Hub answers {status}{told}; try again later")
        if isinstance(error, HFValidationError):
            return OutputError(f"{self.target} is not a name that a repository can have: {_clean(str(error))}")
        return OutputError(f"{self.target}: the upload failed ({type(error).__name__}: {_clean(str(error))}); try again when the Hub can be reached")


def _impatient_client() -> Any:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = SILENCE
    return client


def _operation(path: Path, sha256: str = "") -> Any:
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(path.name, path)
    if sha256:
        operation.upload_info.sha256 = bytes.fromhex(sha256)  # it would read the file for it
    return operation


def _holds(files: Mapping[str, Any], manifest: Path) -> bool:
    """Whether a repository holds what this manifest, which has the digests of all of it, was written for."""
    return manifest.name in files and manifest.is_file() and _is(files[manifest.name], manifest)


def _is(entry: Any, path: Path, sha256: str = "") -> bool:
    """Whether a file in a listing is this one."""
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == (sha256 or hashlib.sha256(path.read_bytes()).hexdigest()))
    content = path.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


def _cause(error: Exception) -> Exception:
    """What is behind the error that huggingface_hub raises for a file that could not be sent."""
    return error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error


def _pause(error: Exception, pause: float) -> float | None:
    """How long to wait before the next try, None where it would end as this one did."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = _cause(error)
    if not isinstance(cause, HfHubHTTPError):
        return pause if isinstance(cause, transport_errors()) and not isinstance(cause, OSError) else None  # not for files here, nor when offline
    status = cause.response.status_code
    if not passes(status) and not (status == 403 and cause is not error):  # a signed link that has expired is to be had anew
        return None
    asked = again_after(cause.response, "").pause or pause
    return asked if asked <= LONGEST_WAIT else None


def _clean(text: str) -> str:
    """A message of another program in part of a line, without secrets: links may be signed, and a server may repeat what it was sent."""
    from huggingface_hub import get_token

    text = re.sub(r"https?://\S+|Bearer \S+|hf_\w+", "...", " ".join(text.split()))
    return printable(text.replace(get_token() or "...", "..."))[:200]
