"""Names of the Hub: when it is out of reach, or silent, that is one line and soon."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoint_toys import python, write_model

OPEN = """
import sys
import mergekit_plus.checkpoint.hub as hub
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError
assert hub.PATIENCE == 10
hub.PATIENCE = 0.5
for ref in sys.argv[1:]:
    try:
        print(sorted(Checkpoint.open(ref).specs))
    except CheckpointError as error:
        print(error)
"""


def opened(home: Path, *refs: str, **environment: str) -> list[str]:
    """A line for each name: its tensors, or the error."""
    result = python(f"import os; os.chdir({str(home)!r})\n" + OPEN, *refs, HF_HOME=str(home), **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(refs)
    return lines


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cache that holds org/name, beside a folder local/name."""
    sha = "0" * 40
    folder = tmp_path / "hub" / "models--org--name"
    write_model(folder / "snapshots" / sha, {"w": torch.ones(2)})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)
    write_model(tmp_path / "local" / "name", {"mine": torch.ones(2)})
    return tmp_path


@pytest.mark.parametrize("out_of_reach", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_out_of_reach_an_unknown_name_is_one_line_and_a_cached_one_opens(home: Path, out_of_reach: dict[str, str]) -> None:
    unknown, pinned, impossible, cached, local = opened(home, "no/such", "no/such@v1", "a--b/c", "org/name", "local/name", **out_of_reach)
    assert unknown.startswith("no/such: not a local path, and the Hub cannot be reached")
    assert pinned == unknown
    assert impossible.startswith("a--b/c: no such file or folder, and not a name that the Hub could have")
    assert cached == "['w']"
    assert local == "['mine']"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes every connection and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_is_silent_is_not_waited_for(home: Path, silent_server: str) -> None:
    unknown, cached = opened(home, "no/such", "org/name", HF_HUB_OFFLINE="0", HF_ENDPOINT=silent_server)
    assert "the Hub cannot be reached" in unknown
    assert cached == "['w']"


class _Answers(BaseHTTPRequestHandler):
    """A Hub on which no repository is what one would like."""

    def do_GET(self) -> None:
        status, code = {"gated": (403, "GatedRepo"), "norev": (404, "RevisionNotFound"), "down": (503, "")}.get(self.path.split("/")[4], (401, "RepoNotFound"))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def unkind_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_the_hub_answers_is_one_line(home: Path, unkind_hub: str) -> None:
    refs = ("org/gated", "org/missing", "org/norev@v9", "org/down")
    gated, missing, norev, down = opened(home, *refs, HF_HUB_OFFLINE="0", HF_ENDPOINT=unkind_hub)
    assert gated == "org/gated is gated: ask for access on its page, then `hf auth login`"
    assert missing.endswith("no such repository on the Hub (or it is private: `hf auth login`)")
    assert norev == "org/norev has no revision 'v9'"
    assert "the Hub cannot be reached" in down
