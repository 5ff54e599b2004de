"""HTTP as the Hub of the tests speaks it: ranges, a log that counts bytes, and faults on request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

CHUNK = 1 << 16  # bytes written, and counted, at once


class Stored:
    """The content of a file, in memory or on the disk."""

    def __init__(self, name: str, content: bytes | Path) -> None:
        self.content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        self.lfs = name.endswith((".safetensors", ".bin", ".model")) or self.size > 10 << 20

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read(0, self.size)).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The name of the blob in git; of a large file, that of the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        content = pointer if self.lfs else self.read(0, self.size)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Request:
    """What was asked, and how it was answered; `sent` and `received` count bytes of bodies, as they go."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0
    received: int = 0
    done: bool = False


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD path" a pattern finds: the first `skip` pass, then `times` are hit."""

    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0  # answer so, and not at all as asked
    headers: Mapping[str, str] = field(default_factory=dict)  # sent beside or in place of the right ones
    truncate: int | None = None  # end the connection in order after so many bytes of the body
    reset: int | None = None  # the same with a TCP reset; of a request's body, where that is longer
    stall: int | None = None  # the same, but say nothing more until the server ends
    ignore_range: bool = False
    flip: int | None = None  # this byte of the file comes with all bits turned
    delay: float = 0  # seconds before the answer
    throttle: float = 0  # bytes a second
    then: Callable[[], object] | None = None  # done before the request is looked at: move a branch, revoke a token


class WireServer(ThreadingHTTPServer):
    """A server on a free port of this machine that ends with all its threads and connections; faults and the log are to be read and set while it runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, handler: type[Wire]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.connections: dict[threading.Thread, socket.socket] = {}

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, name="hub")
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()
        with self.lock:
            connections = dict(self.connections)
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections:
            thread.join(10)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""

    def fault(self, pattern: str, **wrong: Any) -> Fault:
        """Let something go wrong from now on; see `Fault`."""
        self.faults.append(Fault(pattern, **wrong))
        return self.faults[-1]

    def requests(self, pattern: str = "") -> list[Request]:
        """The requests so far whose "METHOD path" the pattern finds."""
        return [request for request in list(self.log) if re.search(pattern, f"{request.method} {request.path}")]

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent in answer to them."""
        return sum(request.sent for request in self.requests(pattern))


class Refused(Exception):
    """An error of the Hub: status, X-Error-Code, X-Error-Message."""


class Wire(BaseHTTPRequestHandler):
    """Reads requests, has `_route` say how they are answered, and answers them, faults included."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: WireServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections[threading.current_thread()] = self.connection

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.pop(threading.current_thread(), None)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client hung up, or we did
            self.close_connection = True

    def do_GET(self) -> None:
        bearer = self.headers.get("Authorization")
        path = unquote(self.path.partition("?")[0])
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.request_log = Request(self.command, path, host, self.headers.get("Range"), bearer.removeprefix("Bearer ") if bearer else None)
        with self.server.lock:
            self.server.log.append(self.request_log)
            self.fault = self._fault(f"{self.command} {path}")
        if self.fault.then:
            self.fault.then()
        self.server.closing.wait(self.fault.delay)
        body = self._body()
        try:
            if self.fault.status:
                raise Refused(self.fault.status, "", "a fault of the tests")
            with self.server.lock:
                answer = self._route(body)
            answer()
        except Refused as refused:
            status, code, message = refused.args
            self._answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})
        self.request_log.done = True

    do_HEAD = do_POST = do_PUT = do_GET

    def _fault(self, asked: str) -> Fault:
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.pattern, asked):
                fault.skip -= 1
                if fault.skip < 0:
                    fault.times -= 1
                    return fault
        return Fault("")

    def _body(self) -> bytes:
        """The body of the request; one in chunks too."""
        parts: list[bytes] = []
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        left = 0 if chunked else int(self.headers.get("Content-Length") or 0)
        while True:
            if chunked and not left:
                left = int(self.rfile.readline(), 16)
                if not left:
                    self.rfile.readline()
            if not left:
                return b"".join(parts)
            part = self.rfile.read(min(left, CHUNK))
            if not part:
                raise ConnectionError("the client hung up")
            parts.append(part)
            left -= len(part)
            self.request_log.received += len(part)
            if self.fault.reset is not None and self.request_log.received > self.fault.reset:
                self._reset()
            if chunked and not left:
                self.rfile.readline()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionError("reset")

    def _answer(self, status: int, body: bytes | Stored = b"", headers: Mapping[str, str] | None = None, start: int = 0, stop: int | None = None) -> None:
        """Send an answer, and the faults of its body."""
        size = body.size if isinstance(body, Stored) else len(body)
        stop = size if stop is None else stop
        self.request_log.status = status
        self.send_response_only(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(stop - start), **(headers or {}), **self.fault.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        fault, at = self.fault, start
        ends = [end for end in (fault.truncate, fault.reset, fault.stall) if end is not None]
        end = min([stop, *(start + end for end in ends)])
        while self.command != "HEAD" and at < end:
            part = bytearray(body.read(at, min(at + CHUNK, end)) if isinstance(body, Stored) else body[at : min(at + CHUNK, end)])
            if fault.flip is not None and at <= fault.flip < at + len(part):
                part[fault.flip - at] ^= 0xFF
            self.request_log.sent += len(part)  # counted first: the client may be done before we go on
            self.wfile.write(part)
            at += len(part)
            if fault.throttle and self.server.closing.wait(len(part) / fault.throttle):
                raise ConnectionError("the server ends")
        if ends and self.command != "HEAD":
            self.wfile.flush()
            if fault.reset is not None:
                self._reset()
            if fault.stall is not None:
                self.server.closing.wait()
            self.close_connection = True

    def _route(self, body: bytes) -> Callable[[], None]:
        """What to answer; looked up under the lock, sent outside of it."""
        raise NotImplementedError

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> Callable[[], None]:
        return lambda: self._answer(200, json.dumps(value).encode(), headers)

    def _file(self, file: Stored, headers: Mapping[str, str]) -> Callable[[], None]:
        """A file, or the range of it that was asked for."""
        told = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"', **headers}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.request_log.range or "")
        if not match or not any(match.groups()) or self.fault.ignore_range:
            return lambda: self._answer(200, file, told)
        start = int(match[1]) if match[1] else max(0, file.size - int(match[2]))
        stop = min(int(match[2]) + 1, file.size) if match[1] and match[2] else file.size
        if start >= stop:
            return lambda: self._answer(416, b"", {**told, "Content-Range": f"bytes */{file.size}"})
        return lambda: self._answer(206, file, {**told, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}, start, stop)
