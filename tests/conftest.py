"""What all tests share: small machines, no hub, no hang."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

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
