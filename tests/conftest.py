"""What all tests share: small machines, no hub, no hang."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_client import redirect
from hub_server import Hub
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from program import Program

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; a test that wants the network says so itself
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; threads that wait for one another only slow a busy machine

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("suite")

HANG = 300  # seconds that no single test may take


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A hang is the worst bug: after five minutes every thread's stack is printed and the run ends."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub on this machine."""
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF_HOME of a test; empty."""
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture
def own_hub(hub: Hub, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub to which the huggingface_hub of this process is turned, with a token that may write."""
    from huggingface_hub import close_session

    redirect(hub, hub_home, monkeypatch)
    yield hub
    close_session()


@pytest.fixture
def compress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program, run in this process and in `tmp_path`."""
    from program import Program

    return Program(tmp_path, capsys, monkeypatch)
