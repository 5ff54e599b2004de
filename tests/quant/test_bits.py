"""Codes as a dense stream of bits: words written out by hand, and every width against a loop over single bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats.bits import pack, unpack, words


def by_hand(text: str) -> int:
    """The int32 of a word written as binary, highest bit first."""
    value = int(text.replace(" ", ""), 2)
    return value - (1 << 32) if value >> 31 else value


def one_bit_at_a_time(row: list[int], bits: int) -> list[int]:
    """The specification, read aloud: bit t of word w is bit 32w + t of the row."""
    stream = 0
    for place, code in enumerate(row):
        stream |= (code + (1 << (bits - 1))) << (place * bits)
    found = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words(len(row), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def codes_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8)


def test_four_bits_the_first_code_is_the_lowest_nibble() -> None:
    assert pack(codes_of([[-8, -7, -6, -5, -4, -3, -2, -1]]), 4).tolist() == [[0x76543210]]


def test_eight_bits_a_code_is_a_byte() -> None:
    assert pack(codes_of([[-128, -127, -126, 127]]), 8).tolist() == [[by_hand("11111111 00000010 00000001 00000000")]]


def test_two_bits_sixteen_codes_a_word() -> None:
    assert pack(codes_of([[-2, -1, 0, 1] * 4]), 2).tolist() == [[by_hand("11100100" * 4)]]


def test_three_bits_the_eleventh_code_straddles_two_words() -> None:
    # stored 1 2 3 4 5 6 7 0 1 2 | 7 = 111: two bits end the first word, one begins the second
    row = [-3, -2, -1, 0, 1, 2, 3, -4, -3, -2, 3]
    first = by_hand("11 010 001 000 111 110 101 100 011 010 001")
    assert pack(codes_of([row]), 3).tolist() == [[first, 0b1]]


def test_the_last_word_is_filled_with_zeros() -> None:
    assert pack(codes_of([[7], [-8]]), 4).tolist() == [[0xF], [0x0]]
    assert words(1, 3) == 1
    assert words(11, 3) == 2
    assert words(32, 7) == 7


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 11, 31, 32, 33, 64, 100])
def test_every_width_and_length_is_the_stream_of_the_specification(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-1 << (bits - 1), 1 << (bits - 1), (3, count), generator=generator, dtype=torch.int8)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.tolist() == [one_bit_at_a_time(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(codes, before)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_unpack_undoes_pack(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1 << (bits - 1), 1 << (bits - 1), (rows, count), generator=generator, dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


def test_a_view_that_begins_anywhere_packs_like_its_copy() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(10)[3 : 3 + 96].view(3, 32)
    assert torch.equal(pack(codes, 4), pack(codes.clone(), 4))
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
