"""A save with a job keeps what it has finished when its environment fails it, says so, and goes on from there; anything else it refuses by name."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import files_in, layouts, map_step, mapped, write_model
from hub_server import Hub
from torch import Tensor

import mergekit_plus
import mergekit_plus.checkpoint.plan as plans
import mergekit_plus.checkpoint.shards as shards
from mergekit_plus.checkpoint import Checkpoint, Measured, Plan, SaveOptions, Scan, save
from mergekit_plus.checkpoint.journal import Done, Journal, read
from mergekit_plus.checkpoint.stage import Stage
from mergekit_plus.errors import CheckpointError, OutputError, ReadError

TENSORS = {f"layers.{n}.w": torch.arange(1000.0).view(100, 10) + n for n in range(8)}  # 4 kB each, one to a shard


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plans, layouts):
        monkeypatch.setattr(module, "SLAB", 200)
    monkeypatch.setattr(shards, "READ_BACK", 500)
    monkeypatch.setattr(shards, "CHECKPOINT", 1000)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_model(tmp_path / "in", TENSORS, 2)
    return tmp_path


def run(place: Path, function: Callable[[Tensor], Tensor] = torch.neg, **options: Any) -> None:
    """Save the input through a function, as a job."""
    given = {"workers": 1, "max_shard_size": 5000, "job": "negate", **options}
    save(mapped(Checkpoint.open(place / "in"), function), place / "out", SaveOptions(**given), lambda manifest, folder: {"README.md": b"model"})


def journal(place: Path) -> Done:
    return read(place / ".out.partial" / "journal")


def throw(error: BaseException) -> Callable[[Tensor], Tensor]:
    def function(tensor: Tensor) -> Tensor:
        raise error

    return function


def fails_late(place: Path, error: BaseException) -> Callable[[Tensor], Tensor]:
    """Negates five of the eight tensors, waits until the journal tells of two files and of the inputs' digests, and fails."""

    def function(tensor: Tensor) -> Tensor:
        deadline = time.monotonic() + 10
        if float(tensor.flatten()[0]) == 5.0:  # the sixth tensor's first rows
            while (len(journal(place).shards) < 2 or not journal(place).inputs) and time.monotonic() < deadline:
                time.sleep(0.005)
            raise error
        return -tensor

    return function


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def interrupt(place: Path, error: BaseException = NO_SPACE, **options: Any) -> None:
    with pytest.raises((OutputError, KeyboardInterrupt, CheckpointError)):
        run(place, fails_late(place, error), **options)


@pytest.fixture
def expected(place: Path) -> dict[str, bytes]:
    run(place)
    files = files_in(place / "out")
    shutil.rmtree(place / "out")
    return files


def counted(calls: list[int]) -> Callable[[Tensor], Tensor]:
    def function(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return -tensor

    return function


def listing(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


# ---- what stays, and what is said


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (NO_SPACE, OutputError, r"/out: No space left on device; \d+\.\d of 32\.\d kB are kept, go on with --resume$"),
        (KeyboardInterrupt(), KeyboardInterrupt, r"/out: \d+\.\d of 32\.\d kB are kept, go on with --resume$"),
        (MemoryError(), OutputError, r"/out: out of memory; .* are kept, go on with --resume, and a smaller --memory$"),
        (ReadError("in cannot be read at byte 7: Input/output error"), ReadError, r"at byte 7: Input/output error; .* are kept, go on with --resume$"),
    ],
)
def test_what_is_finished_stays_when_the_environment_fails(
    place: Path, expected: dict[str, bytes], error: BaseException, raised: type[BaseException], message: str
) -> None:
    with pytest.raises(raised, match=message):
        run(place, fails_late(place, error))
    assert listing(place) == [".out.partial", "in"]
    assert sorted(path.name for path in (place / ".out.partial").iterdir()) == ["files", "journal", "lock"]
    calls: list[int] = []
    kept = sum(length for length, _ in journal(place).shards.values())
    run(place, counted(calls), resume=True)
    assert files_in(place / "out") == expected
    assert 4 * sum(calls) <= 8 * 4000 - kept + 8 * 200 + 800  # headers, and the unit in which a file's finished part ends
    assert listing(place) == ["in", "out"]


@pytest.mark.parametrize("error", [CheckpointError("in: not finite"), ZeroDivisionError("a bug")])
def test_after_a_refusal_or_a_bug_nothing_stays(place: Path, error: Exception) -> None:
    with pytest.raises(type(error), match="^(in: not finite|a bug)$"):
        run(place, fails_late(place, error))
    assert listing(place) == ["in"]


def test_nothing_stays_where_nothing_was_finished(place: Path) -> None:
    with pytest.raises(OutputError, match="out: No space left on device; nothing was written$"):
        run(place, throw(NO_SPACE))
    assert listing(place) == ["in"]


def test_a_save_without_a_job_leaves_nothing(place: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; nothing was written$"):
        run(place, throw(NO_SPACE), job=None)
    assert listing(place) == ["in"]


# ---- going on


def test_the_plain_command_says_how_far_an_interrupted_run_got(place: Path, expected: dict[str, bytes]) -> None:
    interrupt(place)
    amount = r"an interrupted run finished \d+\.\d of 32\.\d kB; continue it with --resume, or start over with --overwrite"
    with pytest.raises(OutputError, match=amount):
        run(place)
    assert journal(place).worth_keeping
    calls: list[int] = []
    run(place, counted(calls), overwrite=True)
    assert 4 * sum(calls) == 8 * 4000
    assert files_in(place / "out") == expected


def test_resume_begins_where_there_is_nothing_to_go_on_with(place: Path, expected: dict[str, bytes]) -> None:
    run(place, resume=True)
    assert files_in(place / "out") == expected


def test_an_existing_output_is_replaced_by_a_resumed_run_only_when_both_are_asked_for(place: Path, expected: dict[str, bytes]) -> None:
    old = write_model(place / "out", {"old": torch.ones(2)})
    before = files_in(old)
    interrupt(place, overwrite=True)
    assert files_in(old) == before
    with pytest.raises(OutputError, match="exists already"):
        run(place, resume=True)
    run(place, resume=True, overwrite=True)
    assert files_in(old) == expected


def test_an_output_that_was_set_aside_comes_back_first(place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between the two renames that replace it."""
    old = write_model(place / "out", {"old": torch.ones(2)})
    before, replace = files_in(old), os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "out":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    for finish in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises(OutputError, match="are kept, go on with --resume"):
                run(place, overwrite=True)
        assert listing(place) == [".out.partial", "in"]
        if finish:
            run(place, lambda tensor: pytest.fail("computed"), resume=True)  # type: ignore[arg-type, return-value]
            assert files_in(old) == expected
        else:
            with pytest.raises(ZeroDivisionError):
                run(place, throw(ZeroDivisionError()), overwrite=True)
            assert files_in(old) == before
    assert listing(place) == ["in", "out"]


@pytest.mark.parametrize("other", ["options", "inputs", "shards", "versions"])
def test_another_jobs_work_is_neither_used_nor_thrown_away(place: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    interrupt(place)
    before = files_in(place / ".out.partial" / "files")
    options: dict[str, Any] = {}
    if other == "options":
        options["job"] = "negate twice"
    elif other == "inputs":
        os.utime(place / "in" / "model-00001-of-00002.safetensors")
    elif other == "shards":
        options["max_shard_size"] = 10**6
    else:
        monkeypatch.setattr(mergekit_plus, "__version__", "0.0.9")
    message = rf"an interrupted run with other {other} finished .* kB, which this one cannot use; continue that one, name another output"
    for resume in (False, True):
        with pytest.raises(OutputError, match=message):
            run(place, resume=resume, **options)
    assert files_in(place / ".out.partial" / "files") == before
    run(place, overwrite=True, **options)
    assert listing(place) == ["in", "out"]


@pytest.mark.parametrize("damage", ["a byte differs", "cut short", "gone"])
def test_a_file_that_is_not_what_the_journal_says_starts_over(place: Path, expected: dict[str, bytes], damage: str) -> None:
    interrupt(place)
    victim = place / ".out.partial" / "files" / "model-00001-of-00008.safetensors"
    if damage == "gone":
        victim.unlink()
    elif damage == "cut short":
        os.truncate(victim, 100)
    else:
        data = bytearray(victim.read_bytes())
        data[300] ^= 1
        victim.write_bytes(data)
    calls: list[int] = []
    run(place, counted(calls), resume=True)
    assert files_in(place / "out") == expected
    assert 4000 <= 4 * sum(calls) < 8 * 4000


def test_what_else_lies_among_the_files_goes(place: Path, expected: dict[str, bytes]) -> None:
    interrupt(place)
    (place / ".out.partial" / "files" / "README.md").write_bytes(b"of a moment before the kill")
    run(place, resume=True)
    assert files_in(place / "out") == expected


def test_the_digests_of_inputs_are_not_computed_again(place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(place)
    known = journal(place).inputs
    assert known
    hashed = []
    monkeypatch.setattr("mergekit_plus.digests.Digests.of", lambda self, fd, of=mergekit_plus.digests.Digests.of: hashed.append(fd) or of(self, fd))  # type: ignore[attr-defined]
    run(place, resume=True)
    assert len(hashed) == 3 - len(known)
    assert files_in(place / "out") == expected


# ---- statistics


def test_the_results_of_finished_passes_are_recalled_exactly(place: Path) -> None:
    values = [0.1 + 0.2, -0.0, 5e-324, math.inf, -math.inf, 1e308, 2**60 + 1]
    passes: list[str] = []

    def statistic(scan: Scan) -> Any:
        def compute(name: str) -> Any:
            scan.map(lambda tensors: passes.append(name))
            return values

        first = scan.recall(lambda: compute("first"))
        second = scan.recall(lambda: compute("second"))
        assert [float(a).hex() for a in first] == [float(a).hex() for a in second] == [float(a).hex() for a in values]
        return first

    def measured_run(function: Callable[[Tensor], Tensor], **options: Any) -> None:
        source = Checkpoint.open(place / "in")
        measured = Measured(statistic, whole_model=True)
        steps = [map_step([(source, name)], function, measured=measured) for name in source.specs]
        measured.steps.extend(steps)
        save(Checkpoint("measured", Plan(steps)), place / "out", SaveOptions(workers=1, job="measure", **options))

    with pytest.raises(OutputError, match=r"the measurements, and 0 of 3\d\.\d kB are kept"):
        measured_run(throw(NO_SPACE))
    assert set(passes) == {"first", "second"}
    passes.clear()
    measured_run(torch.neg, resume=True)
    assert passes == []


# ---- the journal


def test_a_journal_torn_at_any_byte_tells_of_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    told = Journal(path, Done({"inputs": "a"}, 100))
    ends, tells = [path.stat().st_size], [str(read(path))]
    for record in ({"input": "x", "sha256": "0"}, {"statistic": "0.0", "value": [math.inf]}, {"shard": "s", "bytes": 50, "sha256": "1"}, {"publishing": True}):
        told.add(**record)
        ends.append(path.stat().st_size)
        tells.append(str(read(path)))
    told.close()
    whole = path.read_bytes()
    assert len(set(tells)) == 5
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        assert str(read(path)) == (tells[complete - 1] if complete else str(Done()))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert str(read(path)) in (*tells, str(Done()))


def test_a_torn_journal_costs_work_and_nothing_else(place: Path, expected: dict[str, bytes]) -> None:
    interrupt(place)
    shutil.copytree(place / ".out.partial", place / "kept")
    whole = (place / "kept" / "journal").read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        shutil.rmtree(place / ".out.partial", ignore_errors=True)
        shutil.copytree(place / "kept", place / ".out.partial")
        (place / ".out.partial" / "journal").write_bytes(whole[:cut])
        run(place, resume=True)
        assert files_in(place / "out") == expected
        shutil.rmtree(place / "out")


def test_a_disk_error_is_the_last_thing_a_journal_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Journal(tmp_path / "journal", Done())
    calls = []

    def failing(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            told.add(publishing=True)
    assert len(calls) == 1  # a second fsync would report success for what was lost
    told.close()
    assert not told.done.publishing


# ---- faults of the disk


@pytest.mark.parametrize("call", ["pwrite", "write", "fsync", "preadv", "replace", "posix_fallocate"])
@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_fails_costs_no_finished_work(place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: str, late: bool) -> None:
    original, calls = getattr(os, call), 0

    def failing(subject: Any, *arguments: Any) -> Any:
        nonlocal calls
        path = os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else str(subject)
        if ".partial/" in path and not path.endswith("lock"):
            calls += 1
            if calls > {"replace": 1, "posix_fallocate": 5}.get(call, 30) * late:
                raise OSError(errno.EIO, "Input/output error")
        return original(subject, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OutputError, match=r"out: Input/output error; (nothing was written|\d+\.\d of 32\.\d kB are kept, go on with --resume)$"):
            run(place)
    assert "out" not in listing(place)
    kept = journal(place)
    if (place / ".out.partial").exists():
        assert kept.worth_keeping
    calls_made: list[int] = []
    run(place, counted(calls_made), resume=True)
    assert files_in(place / "out") == expected
    if call == "replace" and late:
        assert not calls_made  # only its name was missing


def test_space_for_the_small_files_only_is_missing(place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards fit, then the disk is full; once there is space again nothing is computed."""
    path_open = Path.open

    def full(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == "README.md":
            raise NO_SPACE
        return path_open(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OutputError, match=r"No space left on device; 32\.\d of 32\.\d kB are kept"):
            run(place)
    calls: list[int] = []
    run(place, counted(calls), resume=True)
    assert calls == []
    assert files_in(place / "out") == expected


def test_a_disk_that_cannot_be_written_is_known_before_anything_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def readonly(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", readonly)
    with pytest.raises(OutputError, match=r": Read-only file system; choose an output folder that can be written, with -o"):
        run(place, lambda tensor: pytest.fail("computed"))  # type: ignore[arg-type, return-value]


def test_a_partial_folder_deleted_meanwhile_is_one_line(place: Path) -> None:
    def delete(tensor: Tensor) -> Tensor:
        shutil.rmtree(place / ".out.partial", ignore_errors=True)
        return tensor

    with pytest.raises(OutputError, match="out: No such file or directory; nothing was written"):
        run(place, delete)
    assert listing(place) == ["in"]
    run(place)


def test_an_output_that_came_to_exist_meanwhile_costs_no_work(place: Path, expected: dict[str, bytes]) -> None:
    def somebody_else(tensor: Tensor) -> Tensor:
        if not (place / "out").exists():
            write_model(place / "out", {"theirs": torch.ones(2)})
        return -tensor

    with pytest.raises(OutputError, match=r"out exists already; .*; 32\.\d of 32\.\d kB are kept, go on with --resume"):
        run(place, somebody_else)
    assert list(Checkpoint.open(place / "out").specs) == ["theirs"]
    calls: list[int] = []
    run(place, counted(calls), resume=True, overwrite=True)
    assert calls == []
    assert files_in(place / "out") == expected


# ---- two writers


def test_a_second_writer_is_told_who_the_first_is(place: Path) -> None:
    with Stage(place / "out") as first:
        first.begin(None, 0, False, False)
        with pytest.raises(OutputError, match=rf"out: process {os.getpid()} on .*, since 20.*, is writing it; wait until it has ended, or name another"):
            run(place)
    run(place)


def test_many_writers_of_one_output_take_turns_or_give_up(place: Path, expected: dict[str, bytes]) -> None:
    """Locks, folders and lock files come and go under each other's hands; the output is whole after each."""
    told: list[str] = []

    def writer() -> None:
        for _ in range(4):
            try:
                run(place, overwrite=True)
            except OutputError as error:
                told.append(str(error))

    threads = [threading.Thread(target=writer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is writing it" in message for message in told)
    assert files_in(place / "out") == expected
    assert listing(place) == ["in", "out"]


def test_a_lock_on_a_file_that_its_owner_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, times = tmp_path / ".out.partial" / "lock", fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        flock(fd, operation)
        times.append(fd)
        if len(times) == 1:
            lock.unlink()
            lock.parent.rmdir()

    monkeypatch.setattr(fcntl, "flock", late)
    with Stage(tmp_path / "out") as stage:
        stage.keep = False
        assert len(times) == 2
        assert lock.read_bytes().startswith(b"process ")
    assert listing(tmp_path) == []


def test_where_files_cannot_be_locked_one_is_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.warns(UserWarning, match="cannot lock files: make sure that no second run writes out"):
        save(Checkpoint.from_tensors(TENSORS), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["outputs"]


def test_a_partial_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        save(Checkpoint.from_tensors(TENSORS), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


# ---- from the Hub


def test_a_resumed_run_fetches_only_what_it_still_needs(own_hub: Hub, place: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("mergekit_plus.checkpoint.hub.HEAD", 1024)
    monkeypatch.setattr("mergekit_plus.checkpoint.prefetch.SMALLEST", 1000)
    own_hub.commit("org/name", place / "in")

    def from_hub(function: Callable[[Tensor], Tensor], **options: Any) -> int:
        """Bytes of tensor files that the Hub sent."""
        own_hub.log.clear()
        try:
            options = {"workers": 1, "max_shard_size": 5000, "job": "negate", **options}
            save(mapped(Checkpoint.open("org/name"), function), place / "out", SaveOptions(**options), lambda manifest, folder: {"README.md": b"model"})
        finally:
            sent = own_hub.sent("resolve.*safetensors$")
        return sent

    with pytest.raises(OutputError, match="No space left on device; .* are kept"):
        from_hub(fails_late(place, NO_SPACE))
    kept = sum(length for length, _ in journal(place).shards.values())
    assert from_hub(torch.neg, resume=True) < 32_000 - kept + 8 * 500 + 8 * 1024
    manifest = json.loads(files_in(place / "out").pop("manifest.json"))
    told = [facts.pop("verified") for files in manifest["inputs"].values() for facts in files.values()]
    assert not all(told)  # what is read in two halves is not hashed whole
    assert {name: data for name, data in files_in(place / "out").items() if name != "manifest.json"} == {
        name: data for name, data in expected.items() if name != "manifest.json"
    }
    shutil.rmtree(place / "out")
    from_hub(torch.neg)
    whole = json.loads(files_in(place / "out")["manifest.json"])
    told = [facts.pop("verified") for files in whole["inputs"].values() for facts in files.values()]
    assert all(told)
    assert whole == manifest


# ---- the order of things


def test_what_the_journal_tells_of_is_on_the_disk_before_and_names_come_last(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL leaves the page cache as it is, so this order is what holds when the power fails."""
    events: list[str] = []
    fsync, replace, add = os.fsync, os.replace, Journal.add

    def spied_fsync(fd: int) -> None:
        fsync(fd)
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    def spied_replace(source: Path, target: Path) -> None:
        events.append(f"rename {Path(source).name}")
        replace(source, target)

    def spied_add(self: Journal, **record: Any) -> None:
        events.append("tell " + str(record.get("shard", next(iter(record)))))
        add(self, **record)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    monkeypatch.setattr(Journal, "add", spied_add)
    run(place, max_shard_size=20_000)
    shards_told = [event.removeprefix("tell ") for event in events if event.startswith("tell model-")]
    assert len(shards_told) > 8
    for name in set(shards_told):  # each time it is told of, it has just been synced
        own = [event.removeprefix("tell ") for event in events if event in (name, f"tell {name}")]
        assert [event for event in events if event in (name, f"tell {name}")] == [name, f"tell {name}"] * (len(own) // 2)
    end = events.index("tell publishing")
    assert events[end - 2 :] == ["manifest.json", "files", "tell publishing", "journal", "rename files", ".out.partial", place.name]
