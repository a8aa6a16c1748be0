"""Packing: exact to the bit for any bits, as small as promised, and never believed unchecked."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swap.errors import CorruptWeights
from swap.packing import (
    BLOCK_WEIGHTS,
    COUNTED_WEIGHTS,
    TILE_WEIGHTS,
    pack,
    packed_bytes,
    read_piece,
    unpack,
)
from swap.unpacking import TILE_BLOCKS, HostUnpacker

LENGTHS = [
    *(0, 1, BLOCK_WEIGHTS - 1, BLOCK_WEIGHTS, BLOCK_WEIGHTS + 1),
    *(TILE_BLOCKS * BLOCK_WEIGHTS, TILE_BLOCKS * BLOCK_WEIGHTS + 1, 40 * BLOCK_WEIGHTS - 7),
]


def normal(count, seed=0, scale=0.02):
    """Normally distributed weights as bfloat16 bits, cut rather than rounded."""
    draw = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * scale
    return (draw.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def with_exponents(exponents, seed):
    """Weights with these exponents, and random signs and mantissas."""
    rest = np.random.default_rng(seed).integers(0, 1 << 16, len(exponents), np.uint16)
    return (rest & 0x807F) | (exponents.astype(np.uint16) << np.uint16(7))


def round_trip(weights):
    """Pack and unpack in both ways; the piece's size, None when it stays raw."""
    packed = pack(weights)
    if packed is None:
        return None
    assert len(packed) < 2 * len(weights)
    piece = read_piece(packed, len(weights))
    assert piece.size_bytes == len(packed)
    assert np.array_equal(unpack(piece), weights)
    # With canaries on both sides: nothing else may be written.
    fast = np.full(len(weights) + 128, 0xBEEF, np.uint16)
    HostUnpacker().unpack_into(piece, fast[64:-64])
    assert np.array_equal(fast[64:-64], weights)
    assert set(fast[:64]) | set(fast[-64:]) == {0xBEEF}
    last = len(piece.offsets) - 2
    one = unpack(piece, last, 1)
    assert np.array_equal(one, weights[last * BLOCK_WEIGHTS :])
    return len(packed)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_comes_back(length):
    size = round_trip(normal(length))
    # One weight in a second block would cost the whole of that block.
    assert (size is None) == (length in (0, 1, BLOCK_WEIGHTS + 1))


PATTERNS = {
    "zeros": lambda n: np.zeros(n, np.uint16),
    "minus zero": lambda n: np.full(n, 0x8000, np.uint16),
    "infinities": lambda n: np.where(np.arange(n) % 2, 0x7F80, 0xFF80).astype(np.uint16),
    "NaN of every kind": lambda n: (np.arange(n) % 127 + 0x7F81).astype(np.uint16),
    "denormals": lambda n: (np.arange(n) % 128).astype(np.uint16),
    "a rare NaN": lambda n: np.where(np.arange(n) % 977, 0x3F80, 0x7FC1).astype(np.uint16),
    "last block all rare": lambda n: with_exponents(
        np.where(np.arange(n) < n - 4096, 120, np.arange(n) % 256), 3
    ),
    "first block all rare": lambda n: with_exponents(
        np.where(np.arange(n) > 4096, 120, np.arange(n) % 256), 4
    ),
    "seven": lambda n: with_exponents(np.arange(n) % 7 + 100, 5),
    "eight": lambda n: with_exponents(np.arange(n) % 8 + 100, 5),
    "fifteen": lambda n: with_exponents(np.arange(n) % 15 * 17, 6),
    "sixteen": lambda n: with_exponents(np.arange(n) % 16 * 17, 6),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_that_are_hard_come_back(name):
    for length in (20 * BLOCK_WEIGHTS, 20 * BLOCK_WEIGHTS + 5):
        assert round_trip(PATTERNS[name](length)) is not None


def test_what_cannot_be_packed_stays_raw():
    every = np.arange(1 << 16, dtype=np.uint16)
    assert pack(every) is None  # all exponents alike often
    assert pack(np.random.default_rng(0).integers(0, 1 << 16, 50_000, np.uint16)) is None


def test_seven_exponents_take_three_bits_and_fifteen_take_four():
    count = 64 * BLOCK_WEIGHTS
    for number, bits in ((7, 3), (15, 4)):
        packed = pack(with_exponents(np.arange(count) % number + 90, 1))
        assert len(packed) == packed_bytes(count, 0, bits)
        assert len(packed) * 8 / count == pytest.approx(8 + bits, abs=0.02)


def test_normal_weights_take_what_their_exponents_promise():
    """11.2 bits with codes of 3 bits; 12.0 were there only those of 4."""
    count = 4 << 20
    weights = normal(count)
    exponents = np.bincount((weights >> 7) & 0xFF, minlength=256) / count
    entropy = -sum(share * np.log2(share) for share in exponents if share)
    assert entropy == pytest.approx(2.55, abs=0.05)
    most = np.sort(exponents)[::-1]
    rare = {bits: 1 - most[: (1 << bits) - 1].sum() for bits in (3, 4)}
    assert rare[3] == pytest.approx(0.021, abs=0.006)
    assert rare[4] < 0.0005
    sizes = {
        bits: packed_bytes(count, round(rare[bits] * count), bits) * 8 / count for bits in (3, 4)
    }
    assert 11.1 < sizes[3] < 11.25
    assert 12.0 < sizes[4] < 12.03
    packed = pack(weights)
    assert len(packed) * 8 / count == sizes[3]
    assert np.array_equal(unpack(read_piece(packed, count)), weights)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bits_come_back(data):
    length = data.draw(st.one_of(st.sampled_from(LENGTHS), st.integers(0, 3 * BLOCK_WEIGHTS)))
    few = data.draw(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40))
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    weights = np.array(few, np.uint16)[draw.integers(0, len(few), length)]
    rare = draw.random(length) < data.draw(st.sampled_from([0.0, 0.001, 0.1, 0.4]))
    weights[rare] = draw.integers(0, 1 << 16, int(rare.sum()), np.uint16)
    round_trip(weights)


def test_packing_twice_gives_the_same_bytes():
    weights = normal(10_000)
    assert pack(weights).tobytes() == pack(weights.copy()).tobytes()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_damage_is_noticed_or_unpacks_within_bounds(seed, hits, in_front):
    draw = np.random.default_rng(seed)
    weights = normal(5 * BLOCK_WEIGHTS + 9, scale=1.0)
    packed = pack(weights)
    for _ in range(hits):
        end = 192 if in_front else len(packed)
        packed[draw.integers(0, end)] = draw.integers(0, 256)
    fast = np.full(len(weights) + 128, 0xBEEF, np.uint16)
    try:
        piece = read_piece(packed, len(weights))
        expected = unpack(piece)
    except CorruptWeights:
        expected = None
    try:
        HostUnpacker().unpack_into(read_piece(packed, len(weights)), fast[64:-64])
    except CorruptWeights:
        assert expected is None
    else:
        assert np.array_equal(fast[64:-64], expected)
    assert set(fast[:64]) | set(fast[-64:]) == {0xBEEF}


def test_a_piece_that_lies_is_refused():
    count = 2 * BLOCK_WEIGHTS
    weights = normal(count)
    packed = pack(weights)
    offsets = packed[64:76].view(np.uint32)
    assert offsets[2] == len(read_piece(packed, count).exceptions) > 0
    for place, value, says in (
        (0, 0, "start as one"),
        (4, 5, "start as one"),
        (8, 7, "weights, where"),
        (12, packed[12] + 1, "take"),
        (64, 1, "follow one another"),
        (69, 0xFF, "follow one another"),
        (72, 0, "follow one another"),
    ):
        altered = packed.copy()
        altered[place] = value & 0xFF
        with pytest.raises(CorruptWeights, match=says):
            read_piece(altered, count)
    with pytest.raises(CorruptWeights, match="where there should be"):
        read_piece(packed, count + 1)
    with pytest.raises(CorruptWeights, match="take"):
        read_piece(packed[:-1], count)
    with pytest.raises(CorruptWeights, match="5 bytes"):
        read_piece(packed[:5], count)
    moved = packed.copy()
    moved[64:76].view(np.uint32)[1] -= 1  # one exception handed from a block to the next
    piece = read_piece(moved, count)
    with pytest.raises(CorruptWeights, match="another number of escapes"):
        unpack(piece)
    with pytest.raises(CorruptWeights, match="another number of escapes"):
        HostUnpacker().unpack_into(piece, np.empty(count, np.uint16))


def test_what_arrived_is_unpacked_and_not_the_hosts_copy():
    weights = normal(3 * BLOCK_WEIGHTS)
    packed = pack(weights)
    arrived, out = packed.copy(), np.zeros_like(weights)
    signs_at = read_piece(packed, len(weights)).part_offsets_bytes[1]
    arrived[signs_at] ^= 0x80
    unpacker = HostUnpacker()
    unpacker.unpack(read_piece(packed, len(weights)), arrived.ctypes.data, out.ctypes.data)
    assert out[0] == weights[0] ^ 0x8000
    assert np.array_equal(out[1:], weights[1:])
    unpacker.move(weights.ctypes.data, out.ctypes.data, weights.nbytes)
    assert ctypes.string_at(out.ctypes.data, out.nbytes) == weights.tobytes()


@pytest.mark.parametrize("rare", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("more", [-1, 0, 1, BLOCK_WEIGHTS + 7])
def test_weights_of_more_than_one_tile_come_back(more, rare):
    """With codes of 3 bits, of 4, and with many exceptions, across the edges of what is packed and
    of what is counted at once."""
    draw = np.random.default_rng(5)
    for count in (TILE_WEIGHTS + more, COUNTED_WEIGHTS + more):
        commonest = 7 if rare == 0.0 else 15
        usual, any_ = draw.integers(0, commonest, count), draw.integers(0, 256, count)
        exponents = np.where(draw.random(count) < rare, any_, usual)
        weights = (draw.integers(0, 1 << 16, count) & 0x807F | exponents << 7).astype(np.uint16)
        piece = read_piece(pack(weights), count)
        assert piece.code_bits == (3 if rare == 0.0 else 4)
        assert np.array_equal(unpack(piece), weights)
        found = np.bincount(exponents, minlength=256)
        assert len(piece.exceptions) == found.sum() - np.sort(found)[-piece.escape :].sum()
