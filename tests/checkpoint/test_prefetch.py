"""Fetching ahead: neighbours in one request, in the order of the plan, within a bound, and never a wait that nobody ends."""

from __future__ import annotations

import hashlib
import random
import threading

import pytest

import mergekit_plus.checkpoint.hub as hub_module
from mergekit_plus.checkpoint.hub import HubFile, Listed
from mergekit_plus.checkpoint.prefetch import SMALLEST, THREADS, Prefetch, plan_spans
from mergekit_plus.errors import CheckpointError, Unreachable

KIB = 1 << 10
HEAD = 16


class Remote:
    """Bytes that are somewhere else; counts what is fetched, and how many at once."""

    def __init__(self, content: bytes) -> None:
        self.content, self.stop = content, threading.Event()
        self.fetched: list[tuple[int, int]] = []
        self.gate = threading.Event()  # nothing comes before it is set
        self.gate.set()
        self.error: Exception | None = None

    def fetch(self, buffer: memoryview, offset: int) -> None:
        self.fetched.append((offset, len(buffer)))
        if offset:
            self.gate.wait(30)
        if self.error is not None and offset:
            raise self.error
        buffer[:] = self.content[offset : offset + len(buffer)]


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HEAD", HEAD)


def remote(size: int, name: str = "a.safetensors", sha256: str | None = None) -> tuple[HubFile, Remote]:
    content = random.Random(size).randbytes(size)
    file = HubFile("org/name", "0" * 40, Listed(name, size, sha256 or hashlib.sha256(content).hexdigest(), ""))
    there = Remote(content)
    file._remote = there  # type: ignore[assignment]
    return file, there


def spans_of(*reads: tuple[int, int], limit: int = 100, size: int = 10_000) -> list[tuple[int, int]]:
    file, _ = remote(size)
    queue, own = plan_spans([(file, start, length) for start, length in reads], limit)
    assert [span.start for span in own.get(file, [])] == sorted(span.start for span in queue)
    return [(span.start, span.stop) for span in queue]


@pytest.mark.usefixtures("small_heads")
def test_neighbours_come_together_up_to_the_limit_and_nothing_comes_twice() -> None:
    assert spans_of((20, 10), (30, 10), (40, 10)) == [(20, 50)]
    assert spans_of((20, 10), (31, 10)) == [(20, 30), (31, 41)]  # a hole is not read
    assert spans_of((20, 250)) == [(20, 120), (120, 220), (220, 270)]
    assert spans_of((20, 90), (110, 90)) == [(20, 120), (120, 200)]
    assert spans_of((0, 10), (10, 10)) == [(16, 20)]  # the head is there already
    assert spans_of((0, 16)) == []
    assert spans_of((50, 10), (20, 10), (30, 20)) == [(50, 60), (20, 50)]  # the plan's order stays
    assert spans_of((20, 30), (20, 30), (40, 30), (30, 60)) == [(20, 90)]
    assert spans_of((20, 10), (60, 10), (30, 40)) == [(20, 30), (60, 70), (30, 60)]


def read(file: HubFile, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(memoryview(buffer), start)
    return bytes(buffer)


@pytest.mark.usefixtures("small_heads")
@pytest.mark.parametrize("workers", [1, 3])
def test_every_reader_gets_its_bytes_in_any_order_of_reading(workers: int) -> None:
    file, there = remote(3000 * KIB)
    reads = [(start, 50 * KIB) for start in range(0, 3000 * KIB, 50 * KIB)]
    ahead = Prefetch(THREADS * SMALLEST)
    ahead.begin((file, *each) for each in reads)
    random.Random(workers).shuffle(reads)
    wrong: list[int] = []

    def work(mine: list[tuple[int, int]]) -> None:
        wrong.extend(start for start, length in mine if read(file, start, length) != there.content[start : start + length])

    threads = [threading.Thread(target=work, args=(reads[n::workers],)) for n in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    ahead.finish()
    ahead.close()
    assert wrong == []
    assert sum(length for _, length in there.fetched) == 3000 * KIB  # each byte once
    assert len(ahead._buffers) <= THREADS


@pytest.mark.usefixtures("small_heads")
def test_what_is_fetched_ahead_stays_in_its_bound() -> None:
    file, there = remote(5000 * KIB)
    ahead = Prefetch(THREADS * SMALLEST)
    ahead.begin([(file, 0, 5000 * KIB)])
    for _ in range(1000):
        if len(there.fetched) == 1 + THREADS:
            break
        threading.Event().wait(0.005)
    threading.Event().wait(0.05)
    assert len(there.fetched) == 1 + THREADS  # the head, and a span for each buffer
    assert read(file, 0, 5000 * KIB) == there.content
    ahead.finish()
    ahead.close()
    assert file.verified


@pytest.mark.usefixtures("small_heads")
def test_a_file_that_is_read_in_its_order_is_verified_and_one_that_is_not_is_not() -> None:
    for reverse in (False, True):
        file, _ = remote(2000 * KIB)
        ahead = Prefetch(THREADS * SMALLEST)
        reads = sorted(((start, 20 * KIB) for start in range(0, 2000 * KIB, 20 * KIB)), reverse=reverse)
        ahead.begin((file, *each) for each in reads)
        for start, length in reads:
            read(file, start, length)
        ahead.finish()
        ahead.close()
        assert file.verified is not reverse


@pytest.mark.usefixtures("small_heads")
def test_a_file_that_is_not_what_the_hub_lists_fails_what_reads_it() -> None:
    file, _ = remote(500 * KIB, sha256="0" * 64)
    ahead = Prefetch(THREADS * SMALLEST)
    ahead.begin([(file, 0, 500 * KIB)])

    def work() -> None:
        for start in range(0, 500 * KIB, 20 * KIB):
            read(file, start, 20 * KIB)
        ahead.finish()

    with pytest.raises(CheckpointError, match="are not those that the Hub lists"):
        work()
    ahead.close()


@pytest.mark.usefixtures("small_heads")
def test_one_failure_is_everybodys_and_nobody_waits_after_it() -> None:
    good, there = remote(500 * KIB, "good.safetensors")
    bad, broken = remote(500 * KIB, "bad.safetensors")
    assert there.fetched == broken.fetched == []
    good.head, bad.head  # noqa: B018
    there.gate.clear()  # its bytes never come
    broken.error = Unreachable("the network is down")
    ahead = Prefetch(THREADS * SMALLEST)
    ahead.begin([(good, 0, 100 * KIB), (bad, 0, 100 * KIB)])
    with pytest.raises(Unreachable, match="the network is down"):
        read(good, 0, 100 * KIB)
    ahead.close()
    there.gate.set()


@pytest.mark.usefixtures("small_heads")
def test_who_waits_is_let_go_when_all_is_stopped_and_the_file_can_be_read_again() -> None:
    file, there = remote(500 * KIB)
    ahead = Prefetch(THREADS * SMALLEST)
    file.head  # noqa: B018
    there.gate.clear()
    ahead.begin([(file, 0, 500 * KIB)])
    errors: list[Exception] = []

    def wait() -> None:
        try:
            read(file, 0, 100 * KIB)
        except Unreachable as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    ahead.close()
    waiting.join(30)
    assert not waiting.is_alive()
    there.gate.set()
    assert [str(error) for error in errors] == ["org/name@0000000/a.safetensors: reading was stopped"]
    assert read(file, 0, 500 * KIB) == there.content


@pytest.mark.usefixtures("small_heads")
def test_a_new_plan_forgets_what_the_last_one_did_not_read() -> None:
    file, there = remote(2000 * KIB)
    ahead = Prefetch(THREADS * SMALLEST)
    for start in (0, 1000 * KIB, 0):
        ahead.begin([(file, start, 1000 * KIB)])
        assert read(file, start, 10 * KIB) == there.content[start : start + 10 * KIB]
    ahead.begin([(file, 0, 2000 * KIB)])
    assert read(file, 0, 2000 * KIB) == there.content
    ahead.finish()
    ahead.close()
    assert ahead.free == THREADS
    assert file.verified
