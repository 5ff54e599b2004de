"""Models on the Hub: a reference is pinned to a commit first, and its files are then read by range requests, or from the local Hub cache.

    org/name   org/name@revision   org/name@revision/sub/folder   org/name/sub/folder   org/name/file.safetensors   hf://org/name@revision

A revision with a slash in it is written with %2F, as in huggingface_hub's own `hf://` paths; `refs/pr/1` needs no such care.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ..digests import Digests
from ..errors import CheckpointError, Unreachable
from .blob import check_small
from .ranges import RemoteFile, again_after, passes, patiently, transport_errors

if TYPE_CHECKING:
    from .prefetch import Prefetch

PATIENCE = 10.0  # seconds for the Hub to say anything at all
HEAD = 64 << 10  # bytes of a file that are read first, and kept: its header, as a rule, and the first tensors
PART = r"[\w-][\w.-]*"
REFERENCE = re.compile(rf"(hf://)?({PART}/{PART})(?:@(refs/(?:pr|convert)/[\w.-]+|[^/@\s]+))?((?:/{PART})*)(?:@([^@\s]+))?")


@dataclass(frozen=True)
class Reference:
    """A repository, a revision of it ("" for the default), and a folder or file in it ("" for all)."""

    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{quote(self.revision, safe='')}" if self.revision else "") + (f"/{self.path}" if self.path else "")


def parse_reference(text: str) -> Reference | None:
    """What a text names on the Hub, if it can name something there."""
    match = REFERENCE.fullmatch(text)
    if match is None or (match[3] and match[5]):
        return None
    return Reference(match[2], unquote(match[3] or match[5] or ""), match[4].strip("/"))


@dataclass(frozen=True)
class Listed:
    """A file as the listing of a commit has it; `sha256` is known of large files, `oid` is git's name of a small one's content."""

    path: str
    size: int
    sha256: str
    oid: str


class HubFile:
    """A file of a pinned commit: the first bytes are kept once they are read, the rest comes by range requests, ahead of its use while a save is under way."""

    def __init__(self, repo: str, sha: str, listed: Listed) -> None:
        self.name, self.size, self.sha256 = listed.path.rpartition("/")[2], listed.size, listed.sha256
        self.place = f"{repo}@{sha[:7]}/{listed.path}"
        self.identity = f"{repo}@{sha}/{listed.path} {listed.sha256 or listed.oid}"
        self.verified = False  # whether all of it was read and has the SHA-256 that the Hub lists
        self._ahead: Prefetch | None = None
        self._oid = listed.oid
        self._remote = RemoteFile(repo, sha, listed.path, listed.size, listed.sha256, self.place)
        self._head: bytes | None = None
        self._lock = threading.Lock()

    @property
    def head(self) -> bytes:
        """The first bytes."""
        with self._lock:
            if self._head is None:
                buffer = bytearray(min(HEAD, self.size))
                self._remote.fetch(memoryview(buffer), 0)
                self._head = bytes(buffer)
            return self._head

    def read_into(self, buffer: memoryview, offset: int) -> None:
        known = self.head[offset : offset + len(buffer)]
        buffer[: len(known)] = known
        rest, offset = buffer[len(known) :], offset + len(known)
        ahead = self._ahead
        if rest and ahead is not None:
            ahead.read(self, rest, offset)
        elif rest:
            self.fetch(rest, offset)

    def fetch(self, buffer: memoryview, offset: int) -> None:
        """Read from the Hub, whatever is known already."""
        if offset + len(buffer) > self.size:
            raise CheckpointError(f"{self.place} is {self.size} bytes long, and byte {offset + len(buffer)} was asked for")
        self._remote.fetch(buffer, offset)

    def attach(self, ahead: Prefetch, stop: threading.Event) -> None:
        """Read through what was fetched ahead, until `stop` is set."""
        self._ahead, self._remote.stop = ahead, stop

    def detach(self) -> None:
        """Read from the Hub again."""
        self._ahead, self._remote.stop = None, threading.Event()

    def settle(self, sha256: str) -> None:
        """Compare the SHA-256 of all its bytes, as they came, with the Hub's. Errors: CheckpointError."""
        if self.sha256 and sha256 != self.sha256:
            raise differs(self.place)
        self.sha256, self.verified = sha256, bool(self.sha256)

    def read_bytes(self) -> bytes:
        """The whole of a small file, checked against what the Hub lists. Errors: CheckpointError."""
        return self._content

    @cached_property
    def _content(self) -> bytes:
        check_small(self.place, self.size)
        content = bytearray(self.size)
        self.read_into(memoryview(content), 0)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()  # as git names it
        if not self.sha256 and self._oid not in ("", oid):
            raise differs(self.place)
        self.settle(hashlib.sha256(content).hexdigest())
        self.verified |= bool(self._oid)
        return bytes(content)

    def check_unchanged(self) -> None:
        """A commit does not change; every range was checked as it came."""

    def digest(self, digests: Digests) -> Future[str]:
        future: Future[str] = Future()
        future.set_result(self.sha256)
        return future

    def facts(self, sha256: str) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256, "verified": self.verified}


def differs(place: str) -> CheckpointError:
    """The error of a file that is not what the Hub says it is."""
    return CheckpointError(f"{place}: the bytes that came are not those that the Hub lists (their SHA-256 differs); run again, and if it stays so, use --cache")


class HubFolder:
    """A folder of a pinned commit."""

    def __init__(self, reference: Reference, files: Mapping[str, Listed]) -> None:
        """`reference.revision` is the commit's SHA; `files` are those of the whole repository by their paths."""
        self.reference, self.place = reference, str(replace(reference, revision=reference.revision[:7]))
        prefix = f"{reference.path}/" if reference.path else ""
        self._listed = {path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix) and "/" not in path.removeprefix(prefix)}
        self._open: dict[str, HubFile] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The files in it, without folders."""
        return tuple(self._listed)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._listed[name].size

    def sha256(self, name: str) -> str:
        """What the Hub says that a large file is; "" for a small one."""
        return self._listed[name].sha256

    def path_of(self, name: str) -> str:
        """Where a file is in the repository."""
        return self._listed[name].path

    def open(self, name: str) -> HubFile:
        """One of its files."""
        if name not in self._open:
            self._open[name] = HubFile(self.reference.repo, self.reference.revision, self._listed[name])
        return self._open[name]

    small = open


def pin(reference: Reference) -> tuple[Reference, dict[str, Listed]] | None:
    """The reference at the commit that it names now, and the files of that commit; None where the Hub is out of reach.

    Errors: CheckpointError for a repository or revision that is missing, private or gated.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = reference.repo, reference.revision

    def once() -> Any:
        try:
            return HfApi().repo_info(repo, revision=revision or None, files_metadata=True, timeout=PATIENCE)
        except HfHubHTTPError as error:
            if passes(error.response.status_code):
                raise again_after(error.response, "the Hub") from None
            raise

    try:
        info = patiently(repo, once, attempts=4)
    except (Unreachable, OfflineModeIsEnabled):
        return None
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: no such file or folder, and not a name that the Hub could have: {error}") from None
    except GatedRepoError:
        raise CheckpointError(f"{repo} is gated: ask for access on its page, then `hf auth login`") from None
    except DisabledRepoError:
        raise CheckpointError(f"{repo} is disabled on the Hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repo}: no such file or folder, and no such repository on the Hub (or it is private: `hf auth login`)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision '{revision}' (a slash in a branch's name is written %2F)") from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise CheckpointError(f"{repo}: the Hub does not accept the token (401); log in with `hf auth login`") from None
        raise CheckpointError(f"{repo}: the Hub answers {error.response.status_code}") from None
    except transport_errors():
        return None
    files = {}
    for entry in info.siblings or ():
        sha256 = entry.lfs.sha256 if entry.lfs else ""
        files[entry.rfilename] = Listed(entry.rfilename, entry.size or 0, sha256, entry.blob_id or "")
    return replace(reference, revision=info.sha), files


def way_back() -> str:
    """What to do where the Hub is out of reach."""
    from huggingface_hub import constants

    return "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else f"try again when {constants.ENDPOINT} answers"


def cached_snapshot(reference: Reference, patterns: Iterable[str]) -> Path | None:
    """The folder of this revision in the local Hub cache, if it is there with the files that match; nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = [f"{reference.path}/{pattern}" for pattern in patterns] + [reference.path] if reference.path else list(patterns)
    try:
        return Path(snapshot_download(reference.repo, revision=reference.revision or None, allow_patterns=wanted, local_files_only=True))
    except HFValidationError as error:
        raise CheckpointError(f"{reference.repo}: no such file or folder, and not a name that the Hub could have: {error}") from None
    except Exception:  # not there, or there in part: huggingface_hub has many ways to say so
        return None


def in_cache(folder: HubFolder, names: Iterable[str]) -> Path | None:
    """The snapshot in the local Hub cache that has these files of the folder, whole, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    root: Path | None = None
    for name in names:
        path = folder.path_of(name)
        found = try_to_load_from_cache(folder.reference.repo, path, revision=folder.reference.revision)
        if not isinstance(found, str) or Path(found).stat().st_size != folder.size(name):
            return None
        root = Path(found).parents[path.count("/")]
    return root


def download(folder: HubFolder, names: Iterable[str], revision: str) -> None:
    """Bring these files of it into the local Hub cache; under the revision's own name too, by which it is found there offline.

    Errors: Unreachable where that breaks off.
    """
    from huggingface_hub import snapshot_download

    try:
        for known_as in (revision or None, folder.reference.revision):  # the second asks for nothing, unless the branch has moved just now
            snapshot_download(folder.reference.repo, revision=known_as, allow_patterns=[folder.path_of(name) for name in names])
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Unreachable(f"{folder.place} cannot be brought into the Hub cache: {reason}; what has arrived is kept, run again") from None
    except Exception as error:  # whatever the HTTP library of the day raises, which is not an OSError
        raise Unreachable(f"{folder.place} cannot be brought into the Hub cache ({type(error).__name__}); what has arrived is kept, run again") from None
