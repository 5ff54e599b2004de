"""Headers are hostile: whatever the format (or good sense) forbids is refused, with the reason."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import header_bytes
from safetensors import SafetensorError, safe_open

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.safetensors import MAX_HEADER, parse_header
from mergekit_plus.errors import CheckpointError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(tmp_path: Path, content: bytes, name: str = "x.safetensors") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def entry(**changes: Any) -> bytes:
    return header_bytes({"w": {**GOOD, **changes}}, bytes(8))


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes({"w": GOOD}, struct.pack("<2f", 1, -2)))
    assert Checkpoint.open(path).read("w").tolist() == [1, -2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file: 0 bytes long"),
        (b"\x02\0\0\0\0\0\0", "7 bytes long"),
        ((2**63).to_bytes(8, "little") + b"{}", "its header would be 9223372036854775808 bytes long in a file of 10"),
        ((3).to_bytes(8, "little") + b"{}", "its header would be 3 bytes long in a file of 10"),
        (header_bytes(b""), "not JSON"),
        (header_bytes(b"hello"), "not JSON"),
        (header_bytes(b"[]"), "not a JSON object"),
        (header_bytes(b' {"w":1}'), "not a JSON object"),
        (header_bytes(b"\xef\xbb\xbf{}"), "not JSON"),
        (header_bytes(b'{"w": "\xff"}'), "not JSON"),
        (header_bytes(b"{}\0\0"), "not JSON"),
        (header_bytes(b'{"a":' * 100_000), "not JSON"),
        (header_bytes(b"[" * 100_000), "not JSON"),
        (header_bytes({}, b"tail"), "truncated, or not written to the end"),
    ],
)
def test_what_is_not_a_header_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refused(tmp_path, content)


def test_a_header_beyond_the_limit_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write((MAX_HEADER + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER * 2)  # sparse
    with pytest.raises(CheckpointError, match="its header would be 100000001 bytes long"):
        Checkpoint.open(path)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_constants_that_are_not_json_are_refused(tmp_path: Path, constant: bytes) -> None:
    raw = b'{"w":{"dtype":"F32","shape":[' + constant + b'],"data_offsets":[0,8]}}'
    assert f"the header holds {constant.decode()}" in refused(tmp_path, header_bytes(raw, bytes(8)))


@pytest.mark.parametrize(
    "dim", [b"2.0", b"true", b"null", b'"2"', b"[2]", b"1e1", b"-2", b"-0", b"281474976710657", b"9" * 30, b"9" * 5000]
)
def test_a_dimension_is_a_whole_number_in_bounds(tmp_path: Path, dim: bytes) -> None:
    raw = b'{"w":{"dtype":"F32","shape":[' + dim + b'],"data_offsets":[0,8]}}'
    assert "impossible" in refused(tmp_path, header_bytes(raw, bytes(8)))


@pytest.mark.parametrize("offsets", [[0, 8.0], [False, 8], [0], [0, 4, 8], "08", {"0": 8}, [None, 8], [-8, 0]])
def test_offsets_are_two_whole_numbers(tmp_path: Path, offsets: object) -> None:
    assert "impossible" in refused(tmp_path, entry(data_offsets=offsets))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F33"}, "unknown dtype 'F33'. Did you mean 'F32'"),
        ({"dtype": "float32"}, "unknown dtype 'float32'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": 2}, "impossible shape 2"),
        ({"shape": [1] * 9}, "impossible shape"),
        ({"shape": [2**48, 2**48]}, "its size overflows"),
        ({"shape": [0, 2**48, 2**48], "data_offsets": [0, 0]}, "its size overflows"),
        ({"shape": [3]}, "12 bytes, but its offsets hold 8"),
        ({"shape": [2**40]}, "but its offsets hold 8"),
        ({"data_offsets": [8, 0]}, "but its offsets hold -8"),
        ({"dtype": "F4", "shape": [15]}, "7.5 bytes, but its offsets hold 8"),
        ({"dtype": "F6_E2M3", "shape": [3], "data_offsets": [0, 2]}, "2.25 bytes"),
        ({"extra": 1}, "must have exactly dtype, shape and data_offsets"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in refused(tmp_path, entry(**changes))


@pytest.mark.parametrize("wrong", [1, None, [], "F32", {}, {"dtype": "F32", "shape": [2]}])
def test_an_entry_is_a_table_of_three(tmp_path: Path, wrong: object) -> None:
    assert "tensor 'w' must have exactly dtype, shape and data_offsets" in refused(tmp_path, header_bytes({"w": wrong}, bytes(8)))


@pytest.mark.parametrize(
    ("first", "second", "size", "reason"),
    [
        ([0, 8], [4, 12], 12, "tensor 'b' starts at byte 4, the one before it ends at 8: a hole or an overlap"),
        ([0, 8], [0, 8], 8, "a hole or an overlap"),
        ([0, 8], [12, 20], 20, "tensor 'b' starts at byte 12, the one before it ends at 8"),
        ([8, 16], [16, 24], 24, "tensor 'a' starts at byte 8, the one before it ends at 0"),
        ([0, 8], [8, 16], 12, "truncated, or not written to the end"),
        ([0, 8], [8, 16], 20, "truncated, or not written to the end"),
    ],
)
def test_tensors_cover_the_file_exactly_once(tmp_path: Path, first: list[int], second: list[int], size: int, reason: str) -> None:
    table = {"a": {**GOOD, "data_offsets": first}, "b": {**GOOD, "data_offsets": second}}
    assert reason in refused(tmp_path, header_bytes(table, bytes(size)))


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"w":%s,"w":%s}', "w"),
        (b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', "dtype"),
        (b'{"__metadata__":{"a":"1","a":"2"},"w":%s}', "a"),
        (b'{"__metadata__":{},"__metadata__":{},"w":%s}', "__metadata__"),
        (b'{"w":%s,"\\u0077":%s}', "w"),
    ],
)
def test_no_key_may_appear_twice(tmp_path: Path, raw: bytes, key: str) -> None:
    raw = raw.replace(b"%s", json.dumps(GOOD).encode())
    assert f"the key '{key}' appears twice" in refused(tmp_path, header_bytes(raw, bytes(8)))


def test_a_million_keys_of_which_the_last_is_double_are_refused_quickly() -> None:
    raw = b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in [*range(200_000), 199_999]) + b"}}"
    start = time.monotonic()
    with pytest.raises(ValueError, match="the key '199999' appears twice"):
        parse_header(raw, 8 + len(raw))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "tab\t", "\x7f", "\x9b31m", "x" * 1025])
def test_a_name_is_neither_empty_nor_long_nor_holds_control_characters(tmp_path: Path, name: str) -> None:
    assert "name is empty, too long or has control characters" in refused(tmp_path, header_bytes({name: GOOD}, bytes(8)))


def test_half_a_surrogate_pair_is_not_text(tmp_path: Path) -> None:
    assert "name is empty" in refused(tmp_path, header_bytes({"\ud800": GOOD}, bytes(8)))
    for metadata in ({"a": "\udfff"}, {"\udfff": "a"}):
        assert "not a table of strings" in refused(tmp_path, header_bytes({"__metadata__": metadata, "w": GOOD}, bytes(8)))


@pytest.mark.parametrize("metadata", [None, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_is_a_table_of_strings(tmp_path: Path, metadata: object) -> None:
    assert "__metadata__ is not a table of strings" in refused(tmp_path, header_bytes({"__metadata__": metadata, "w": GOOD}, bytes(8)))


def test_more_tensors_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_plus.checkpoint.safetensors.MAX_TENSORS", 2)
    raw = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in "abc"}).encode()
    with pytest.raises(ValueError, match="3 tensors; at most 2 are read"):
        parse_header(raw, 8 + len(raw))


def test_a_file_cut_short_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = header_bytes({"w": GOOD}, bytes(8))
    for length in range(len(whole)):
        refused(tmp_path, whole[:length])


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"pickles can run code and are not read\. Convert it first: python -c"):
        Checkpoint.open(path)


def test_an_old_pickle_that_calls_itself_safetensors_is_known_for_one(tmp_path: Path) -> None:
    assert "It looks like a pickle" in refused(tmp_path, b"\x80\x02}q\x00.")
    assert "It looks like a pickle" in refused(tmp_path, b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.")


def test_the_command_that_converts_a_pickle_works(tmp_path: Path) -> None:
    import re
    import subprocess
    import sys

    from mergekit_plus.checkpoint.safetensors import PICKLE_HELP

    torch.save({"w": torch.arange(3.0), "tied": torch.ones(2, 2).T}, tmp_path / "IN")
    code = re.search(r'python -c "(.*)"', PICKLE_HELP)
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, check=True)
    assert Checkpoint.open(tmp_path / "OUT.safetensors").read("w").tolist() == [0, 1, 2]


def test_what_the_library_accepts_although_it_should_not_is_refused_here(tmp_path: Path) -> None:
    """Duplicate keys, odd names and extra fields pass safetensors 0.8: two programs could read two models from one file."""
    twice = b'{"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"w":' + json.dumps(GOOD).encode() + b"}"
    for content in (header_bytes(twice, bytes(8)), entry(extra=1), header_bytes({"": GOOD}, bytes(8))):
        refused(tmp_path, content)
        try:
            safe_open(tmp_path / "x.safetensors", "pt")
        except SafetensorError:
            pytest.fail("the library refuses it now too: drop this case")
