"""One file of a pinned commit on the Hub, read by range requests that are believed only when the answer is what was asked for.

The Hub is asked once where the bytes of a file lie (a HEAD request); the ranges go straight there, without the token where that is
another host. Every answer is checked: 206, Content-Range, length and ETag. What may pass is tried again a few times, with pauses that
grow and are random; what a server asks to wait is waited, up to a bound. A range goes on where the one that broke off ended.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import CheckpointError, Unreachable

RANGE = 16 << 20  # bytes asked for at once
STALL = 30.0  # seconds without a byte after which a connection is given up
ATTEMPTS = 6  # tries of one range
PAUSE, LONGEST_PAUSE = 1.0, 8.0  # seconds before the second try, doubled with each further one up to the longest
LONGEST_WAIT = 300.0  # seconds that one range waits in all
FRESH = 50 * 60  # seconds for which a signed link is used; they are signed for an hour

T = TypeVar("T")


class Again(Exception):
    """A try that failed in a way that may pass; `pause` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        self.reason, self.pause = reason, pause


def patiently(place: str, once: Callable[[], T], stop: threading.Event | None = None, attempts: int = ATTEMPTS) -> T:
    """What `once` returns, tried again as long as it raises `Again` and patience lasts.

    Errors: Unreachable naming the place and the last reason; at once when `stop` is set.
    """
    waited, attempt = 0.0, 0
    while True:
        attempt += 1
        try:
            return once()
        except Again as again:
            pause = min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1) if again.pause is None else again.pause
            if waited + pause > LONGEST_WAIT:
                raise Unreachable(f"{place} cannot be read: {again.reason}, and asks to wait {pause:.0f} s; run again then") from None
            if attempt == attempts:
                raise Unreachable(f"{place} cannot be read: {again.reason}, the last of {attempts} tries; run again when the Hub can be reached") from None
            waited += pause
            _sleep(place, pause, stop)


def _sleep(place: str, seconds: float, stop: threading.Event | None) -> None:
    """Wait, but not for what was stopped."""
    while seconds > 0:
        if stop is not None and stop.is_set():
            raise Unreachable(f"{place}: reading was stopped")
        time.sleep(min(seconds, 0.25))
        seconds -= 0.25


def again_after(response: Any, what: str) -> Again:
    """The reason to try again that an answer gives, with the pause that its headers ask for."""
    pause = None
    after = response.headers.get("Retry-After", "")
    if after.strip().isdigit():
        pause = float(after)
    elif after:
        with suppress(ValueError):
            pause = max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    elif match := re.search(r"\bt=(\d+)", response.headers.get("RateLimit", "")):
        pause = float(match[1]) + 1
    return Again(f"{what} answers {response.status_code}", pause)


def transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the day raises for a connection that fails: the Hub's own error is one of them."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def passes(status: int) -> bool:
    """Whether an answer may be another one a moment later."""
    return status in (408, 429) or status >= 500


class RemoteFile:
    """Where a file of a commit lies on the Hub, and the bytes of it.

    etag: what the Hub must say that the file is; "" for whatever it says first.
    """

    def __init__(self, repo: str, sha: str, path: str, size: int, etag: str, place: str) -> None:
        self.repo, self.sha, self.path, self.size, self.place, self._etag = repo, sha, path, size, place, etag
        self.stop = threading.Event()  # whoever sets it wants nothing more
        self._etags: dict[tuple[str, str], str] = {}  # of the first answer of each server that it was read from
        self._location, self._located = "", 0.0
        self._lock = threading.Lock()

    def fetch(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from this offset, `RANGE` bytes at a time.

        Errors: CheckpointError where an answer is not a range of this file; Unreachable where none can be had.
        """
        for start in range(0, len(buffer), RANGE):
            self._fetch(buffer[start : start + RANGE], offset + start)

    def _fetch(self, buffer: memoryview, offset: int) -> None:
        done, stop = 0, self.stop

        def once() -> None:
            nonlocal done
            location = self._locate()
            try:
                with self._answer(location, offset + done, offset + len(buffer)) as response:
                    for chunk in response.iter_raw():
                        if stop.is_set():
                            raise Unreachable(f"{self.place}: reading was stopped")
                        if done + len(chunk) > len(buffer):
                            raise CheckpointError(f"{self.place}: the server sent more than the {len(buffer)} bytes that were asked for")
                        buffer[done : done + len(chunk)] = chunk
                        done += len(chunk)
            except transport_errors() as error:
                raise Again(f"the connection failed ({type(error).__name__})") from None
            if done < len(buffer):
                raise Again("the answer was cut short")

        patiently(self.place, once, stop)

    def _locate(self) -> str:
        """Where the bytes lie; asks the Hub again when the link is old or was refused."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        with self._lock:
            if self._location and time.monotonic() - self._located < FRESH:
                return self._location
            try:
                found = get_hf_file_metadata(hf_hub_url(self.repo, self.path, revision=self.sha), timeout=STALL)
            except HfHubHTTPError as error:
                raise self._refused(error.response) from None
            except OfflineModeIsEnabled:
                raise Unreachable(f"{self.place}: HF_HUB_OFFLINE is set, and this file is not in the local cache") from None
            except transport_errors() as error:
                raise Again(f"the connection failed ({type(error).__name__})") from None
            if found.size is not None and found.size != self.size:
                raise CheckpointError(f"{self.place}: the Hub lists {self.size} bytes but holds {found.size}: the file has changed")
            if found.commit_hash is not None and found.commit_hash != self.sha:
                raise CheckpointError(f"{self.place}: the Hub answers for the commit {found.commit_hash[:12]}")
            if self._etag and found.etag != self._etag:
                raise CheckpointError(f"{self.place}: the file on the Hub has changed: its ETag is {found.etag}, not {self._etag}")
            self._etag = found.etag or ""
            self._location, self._located = found.location, time.monotonic()
            return self._location

    @contextmanager
    def _answer(self, location: str, start: int, stop: int) -> Iterator[Any]:
        """A checked answer to a request for these bytes, its body still to be read."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(token=None if _is_hub(location) else False) | {"Accept-Encoding": "identity"}
        whole = (start, stop) == (0, self.size)
        if not whole:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream("GET", location, headers=headers, timeout=STALL) as response:
            self._check(response, start, stop, whole)
            yield response

    def _check(self, response: Any, start: int, stop: int, whole: bool) -> None:
        status, headers = response.status_code, response.headers
        if status >= 400:
            raise self._refused(response)
        if status == 200 and not whole:
            raise CheckpointError(f"{self.place}: the server ignores ranges and sends the whole file (a proxy?); bring it into the cache with --cache")
        if status != (200 if whole else 206):
            raise CheckpointError(f"{self.place}: the server answers a range request with {status}")
        expected = f"bytes {start}-{stop - 1}/{self.size}"
        if not whole and headers.get("Content-Range") != expected:
            raise CheckpointError(f"{self.place}: the server sent '{headers.get('Content-Range')}' where '{expected}' was asked for: the file has changed")
        if headers.get("Content-Length", str(stop - start)) != str(stop - start):
            raise CheckpointError(f"{self.place}: the server sends {headers['Content-Length']} bytes where {stop - start} were asked for")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(f"{self.place}: the server sends the bytes encoded as {headers['Content-Encoding']}")
        server, etag = _origin(str(response.url)), _bare(headers.get("ETag", ""))
        known = self._etags.setdefault(server, etag)  # each server has a name of its own for the same bytes
        if etag != known:
            raise CheckpointError(f"{self.place} changed on the Hub while it was being read: its ETag is now {etag or 'missing'}, not {known}")

    def _refused(self, response: Any) -> Exception:
        """What an error of a server means."""
        status = response.status_code
        if passes(status):
            return again_after(response, "the Hub")
        if not _is_hub(str(response.url)) and status in (400, 401, 403, 404, 410):
            self._location = ""
            return Again("the link to it has expired", 0)
        if status == 416:
            return CheckpointError(f"{self.place}: the file on the Hub is shorter than the {self.size} bytes that the Hub lists: it has changed")
        if response.headers.get("X-Error-Code") == "GatedRepo":
            return Unreachable(f"{self.repo} is gated: ask for access on its page, then `hf auth login`")
        if status == 401:
            return Unreachable(f"{self.place}: the Hub does not accept the token (401); log in with `hf auth login`, then run again")
        if status == 403:
            return Unreachable(f"{self.place}: the Hub refuses it (403): the token may not read {self.repo}")
        if status == 404:
            return CheckpointError(f"{self.place} is not on the Hub any more")
        return CheckpointError(f"{self.place}: the Hub answers {status}")


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _is_hub(url: str) -> bool:
    """Whether this is the Hub itself, which may see the token, and not a server that it sends us to."""
    from huggingface_hub import constants

    return _origin(url) == _origin(constants.ENDPOINT)


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
