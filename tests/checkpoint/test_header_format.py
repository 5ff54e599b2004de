"""The bytes we write are the safetensors library's own; fuzzing.py has the other way, that whatever we accept, it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_toys import header_bytes, random_tensor, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_plus.checkpoint import Checkpoint, TensorSpec, save
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.safetensors import encode_header, file_order, parse_header
from mergekit_plus.checkpoint.spec import DTYPE_BITS

GOLDEN = (
    b"\xc8\0\0\0\0\0\0\0"  # the header's length: 200
    b'{"__metadata__":{"format":"pt"},'
    b'"bb":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    b'"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},'
    b'"c":{"dtype":"U8","shape":[0,3],"data_offsets":[12,12]}}'
    b"  "  # spaces up to a multiple of 8
    b"\xfe\xff\xff\xff\xff\xff\xff\xff"  # -2
    b"\x80\x3f\x00\xc0"  # 1, -2
)


def test_a_file_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([[1], [-2]], dtype=torch.bfloat16), "bb": torch.tensor(-2), "c": torch.empty(0, 3, dtype=torch.uint8)}
    save(Checkpoint.from_tensors(tensors), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == GOLDEN
    again = Checkpoint.open(tmp_path / "x.safetensors")
    assert all(same_bits(again.read(name), tensor) for name, tensor in tensors.items())


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=6))
def test_a_saved_file_is_identical_to_the_librarys(tmp_path: Path, layout: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {name: random_tensor(tag, shape, seed) for seed, (name, (tag, shape)) in enumerate(layout.items())}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ours.unlink(missing_ok=True)
    save_file(tensors, theirs, {"format": "pt"})
    from mergekit_plus.checkpoint import SaveOptions

    save(Checkpoint.from_tensors(tensors), ours, SaveOptions(allow_nonfinite=True))
    assert ours.read_bytes() == theirs.read_bytes()
    again = Checkpoint.open(theirs)
    assert set(again.specs) == set(tensors)
    assert all(same_bits(again.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ['quote"', "back\\slash", "naïve", "重み", "🦙", "../../etc/passwd", "a b", "\u2028", "\u200b", "'"])
def test_odd_names_are_escaped_as_the_library_escapes_them(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "theirs.safetensors", {"format": "pt"})
    save(Checkpoint.open(tmp_path / "theirs.safetensors"), tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize(("tag", "shape", "nbytes"), [("F4", [2, 6], 6), ("F6_E2M3", [2, 4], 6), ("F6_E3M2", [4], 3), ("F4", [0], 0), ("F4", [2], 1)])
def test_dtypes_that_torch_cannot_hold_are_carried_as_bytes(tmp_path: Path, tag: str, shape: list[int], nbytes: int) -> None:
    data = bytes(range(1, nbytes + 1))
    table = {"__metadata__": {"format": "pt"}, "w": {"dtype": tag, "shape": shape, "data_offsets": [0, nbytes]}}
    raw = json.dumps(table, separators=(",", ":")).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes(raw + b" " * (-len(raw) % 8), data))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.specs["w"] == TensorSpec("w", tag, tuple(shape))
    assert bytes(checkpoint.read("w").tolist()) == data
    save(checkpoint, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_rows_of_a_dtype_that_torch_cannot_hold_are_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes({"w": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}, bytes(range(6))))
    assert Checkpoint.open(path).read("w", slice(1, 3)).tolist() == [2, 3, 4, 5]


def test_widest_dtypes_come_first_then_names() -> None:
    specs = [TensorSpec(name, dtype, (1,)) for name, dtype in [("b", "F32"), ("z", "I64"), ("a", "U8"), ("a2", "F32"), ("é", "F32"), ("B", "F32")]]
    assert [spec.name for spec in file_order(specs)] == ["z", "B", "a2", "b", "é", "a"]


@given(st.lists(st.tuples(names, st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 9).map(lambda n: 4 * n), max_size=3)), max_size=8))
def test_every_header_we_write_we_read(layout: list[tuple[str, str, list[int]]]) -> None:
    specs = {name: TensorSpec(name, tag, (4, *shape)) for name, tag, shape in layout}
    header, offsets = encode_header(file_order(specs.values()))
    assert len(header) % 8 == 0
    parsed = parse_header(header[8:], len(header) + sum(spec.nbytes for spec in specs.values()))
    assert parsed.specs == specs
    assert parsed.offsets == offsets


@settings(max_examples=200)
@given(st.binary(max_size=64))
def test_noise_is_refused_in_one_way_only(raw: bytes) -> None:
    try:
        parse_header(raw, 8 + len(raw))
    except ValueError as error:
        assert not isinstance(error, UnicodeError | json.JSONDecodeError)
    else:
        assert json.loads(raw) in ({}, {"__metadata__": {}})
