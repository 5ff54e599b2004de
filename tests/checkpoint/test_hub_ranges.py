"""Range requests are believed when the answer is what was asked for, tried again when that may help, and refused in one line otherwise."""

from __future__ import annotations

from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from checkpoint_toys import files_in, mapped, random_tensor, write_model
from hub_server import TOKEN, Hub

import mergekit_plus.checkpoint.hub as hub_module
import mergekit_plus.checkpoint.ranges as ranges
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, Unreachable

TENSORS = {f"layers.{n}.weight": random_tensor("BF16", (64, 256), n) for n in range(8)}  # 32 KiB each
DATA = "GET .*(resolve.*safetensors$|cdn/)"


@pytest.fixture
def toy(own_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with org/name in two shards of 128 KiB, read after a head of 4 KiB."""
    monkeypatch.setattr(ranges, "PAUSE", 0.001)
    monkeypatch.setattr(hub_module, "HEAD", 4096)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", TENSORS, 2)
    own_hub.commit("org/name", tmp_path / "m")
    return own_hub


def merged(out: Path) -> dict[str, bytes]:
    """The tensor files of org/name, negated and saved."""
    save(mapped(Checkpoint.open("org/name"), torch.neg), out, SaveOptions(workers=2, memory=400 << 20))
    return {name: content for name, content in files_in(out).items() if name.endswith(".safetensors")}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    save(mapped(Checkpoint.open(write_model(tmp_path / "local", TENSORS, 2)), torch.neg), tmp_path / "expected")
    return {name: content for name, content in files_in(tmp_path / "expected").items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("cdn", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        {"reset": 2000},
        {"truncate": 2000},
        {"truncate": 0},
        {"status": 500},
        {"status": 503, "times": 3},
        {"status": 408},
        {"status": 429},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 429, "headers": {"Retry-After": formatdate(0, usegmt=True)}},
        {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=0'}},
    ],
)
def test_what_passes_is_tried_again_and_the_bytes_are_right(
    toy: Hub, tmp_path: Path, expected: dict[str, bytes], fault: dict[str, object], cdn: bool
) -> None:
    toy.cdn = cdn
    for skip in (0, 3):
        toy.fault(DATA, skip=skip, **fault)
    assert merged(tmp_path / "out") == expected
    assert not any(fault.times for fault in toy.faults)


def test_a_range_that_broke_off_goes_on_where_it_ended(toy: Hub) -> None:
    checkpoint = Checkpoint.open("org/name")
    toy.log.clear()
    toy.fault(DATA, truncate=10_000)
    assert torch.equal(checkpoint.read("layers.6.weight"), TENSORS["layers.6.weight"])
    first, second = toy.requests(DATA)
    starts = [int(str(request.range).removeprefix("bytes=").split("-")[0]) for request in (first, second)]
    assert starts[1] == starts[0] + 10_000
    assert first.sent + second.sent == TENSORS["layers.6.weight"].nbytes


def test_a_stalled_connection_is_cut(toy: Hub, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "STALL", 0.3)
    toy.fault(DATA, skip=3, stall=5000)
    toy.fault("HEAD .*resolve.*safetensors", delay=3)
    assert merged(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"ignore_range": True}, r"the server ignores ranges and sends the whole file \(a proxy\?\); bring it into the cache with --cache"),
        ({"headers": {"ETag": '"another"'}}, r"changed on the Hub while it was being read: its ETag is now another, not [0-9a-f]{64}"),
        ({"headers": {"ETag": ""}}, r"its ETag is now missing, not [0-9a-f]{64}"),
        ({"headers": {"Content-Range": "bytes 0-9/10"}}, r"the server sent 'bytes 0-9/10' where 'bytes \d+-\d+/\d+' was asked for: the file has changed"),
        ({"headers": {"Content-Encoding": "br"}}, r"the server sends the bytes encoded as br"),
        ({"status": 416}, r"is shorter than the \d+ bytes that the Hub lists: it has changed"),
        ({"status": 404}, r"is not on the Hub any more"),
        ({"status": 401}, r"the Hub does not accept the token \(401\); log in with `hf auth login`, then run again"),
        ({"status": 403}, r"the Hub refuses it \(403\): the token may not read org/name"),
    ],
)
def test_an_answer_that_is_not_the_range_is_refused_by_the_name_of_the_file(toy: Hub, tmp_path: Path, fault: dict[str, object], error: str) -> None:
    toy.fault(DATA, skip=2, times=99, **fault)  # the first range of each shard passes
    with pytest.raises(CheckpointError, match=rf"^org/name@[0-9a-f]{{7}}/model-0000\d-of-00002\.safetensors:? ?.*{error}") as caught:
        merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert TOKEN not in str(caught.value)
    assert isinstance(caught.value, Unreachable) == (fault.get("status") in (401, 403))


@pytest.mark.parametrize("at", [5000, 100_000, 131_000])
def test_a_byte_that_is_wrong_fails_the_save_before_anything_is_published(toy: Hub, tmp_path: Path, at: int) -> None:
    toy.fault(rf"{DATA}", times=99, flip=at)
    with pytest.raises(CheckpointError, match=r"the bytes that came are not those that the Hub lists \(their SHA-256 differs\)"):
        merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_file_with_a_wrong_byte_is_refused(toy: Hub) -> None:
    toy.fault("GET .*config.json", flip=3)
    with pytest.raises(CheckpointError, match=r"config\.json: the bytes that came are not those that the Hub lists"):
        _ = Checkpoint.open("org/name").config


def test_patience_ends(toy: Hub, tmp_path: Path) -> None:
    toy.fault(DATA, skip=2, times=999, status=503)
    with pytest.raises(Unreachable, match=r"cannot be read: the Hub answers 503, the last of 6 tries; run again when the Hub can be reached"):
        merged(tmp_path / "out")


def test_a_wait_beyond_reason_is_not_waited(toy: Hub, tmp_path: Path) -> None:
    toy.fault(DATA, skip=2, times=999, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(Unreachable, match=r"the Hub answers 429, and asks to wait 3600 s; run again then"):
        merged(tmp_path / "out")


def test_the_cdn_never_sees_the_token_and_the_hub_is_asked_once_for_each_file(toy: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    toy.cdn = True
    assert merged(tmp_path / "out") == expected
    assert {(request.host, request.token) for request in toy.requests("cdn/")} == {("localhost", None)}
    assert len(toy.requests("HEAD .*safetensors$")) == 2
    assert toy.requests("GET .*resolve.*-of-00002.safetensors$") == []


@pytest.mark.parametrize("skip", [0, 2, 3])
def test_a_link_that_expires_is_asked_for_again(toy: Hub, tmp_path: Path, expected: dict[str, bytes], skip: int) -> None:
    toy.cdn = True
    toy.fault(DATA, skip=skip, then=toy.expire_links)
    assert merged(tmp_path / "out") == expected
    assert any(request.status == 403 for request in toy.requests("cdn/"))


def test_what_a_head_request_calls_a_small_file_need_not_be_what_its_bytes_are_called(toy: Hub) -> None:
    toy.fault("HEAD .*config.json", headers={"ETag": '"another"'})
    assert Checkpoint.open("org/name").config == {"model_type": "toy"}


def test_a_link_that_is_old_is_not_used(toy: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.cdn = True
    monkeypatch.setattr(ranges, "FRESH", -1)
    Checkpoint.open("org/name").read("layers.6.weight")
    assert len(toy.requests("HEAD .*-of-00002.safetensors$")) == 3


def test_a_branch_that_moves_in_mid_run_changes_nothing(toy: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    sha = toy.repositories["org/name"].branches["main"]
    toy.fault(DATA, skip=3, then=lambda: toy.commit("org/name", {"model.safetensors": b"other"}))
    assert merged(tmp_path / "out") == expected
    assert toy.repositories["org/name"].branches["main"] != sha
    assert {request.path.split("/")[4] for request in toy.requests("resolve")} == {sha}


def test_a_token_that_is_revoked_in_mid_run_is_one_line(toy: Hub, tmp_path: Path) -> None:
    toy.fault(DATA, skip=3, then=toy.tokens.clear)
    with pytest.raises(Unreachable, match=r"the Hub does not accept the token \(401\); log in with `hf auth login`, then run again"):
        merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_stops_reading_at_once(toy: Hub, tmp_path: Path) -> None:
    toy.fault(f"{DATA}", skip=3, status=404, times=1)
    toy.fault(f"{DATA}", skip=2, throttle=1000, times=99)  # two minutes for what is left
    with pytest.raises(CheckpointError, match="is not on the Hub any more"):
        merged(tmp_path / "out")
    assert not all(request.done for request in toy.requests(DATA))


def test_an_empty_file_asks_for_no_range(own_hub: Hub) -> None:
    own_hub.commit("org/name", {"model.safetensors": b""})
    with pytest.raises(CheckpointError, match="is not a safetensors file: 0 bytes long"):
        Checkpoint.open("org/name")
    assert own_hub.requests(DATA) == []
