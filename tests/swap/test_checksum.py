"""A tensor's checksum: the same however its bytes arrive, and another for any other bytes."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from swap.checksum import (
    BLOCK_BYTES,
    CHECKSUM_CHARACTERS,
    TensorHasher,
    block_digest,
    checksum_of,
    checksum_of_blocks,
)

SIZES = (0, 1, 4095, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 70_000)


def reference(data: bytes) -> str:
    """The rule, written out."""
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    return blake3(b"".join(blake3(block).digest() for block in blocks)).hexdigest()[:32]


@pytest.mark.parametrize("size_bytes", SIZES)
def test_the_checksum_is_what_the_rule_says_however_the_bytes_come(size_bytes):
    source = random.Random(size_bytes)
    data = source.randbytes(size_bytes)
    expected = reference(data)
    assert len(expected) == CHECKSUM_CHARACTERS
    assert checksum_of(data) == checksum_of(memoryview(data)) == expected
    hasher, position = TensorHasher(), 0
    while position < size_bytes:
        count = source.choice((1, 700, 256 << 10, 300_001, BLOCK_BYTES, 2 * BLOCK_BYTES + 3))
        piece = bytearray(data[position : position + count])
        hasher.update(piece)
        piece[:] = bytes(len(piece))  # what was taken may change
        position += count
    assert hasher.checksum() == expected


def test_blocks_may_be_hashed_in_any_order():
    data = random.Random(3).randbytes(5 * BLOCK_BYTES - 17)
    starts = list(range(0, len(data), BLOCK_BYTES))
    digests = [b""] * len(starts)
    for index in (3, 0, 4, 1, 2):
        view = memoryview(data)[starts[index] : starts[index] + BLOCK_BYTES]
        digests[index] = block_digest(view)
    assert checksum_of_blocks(digests) == checksum_of(data)
    digests[0], digests[1] = digests[1], digests[0]
    assert checksum_of_blocks(digests) != checksum_of(data)


@pytest.mark.parametrize("size_bytes", [1, 5000, BLOCK_BYTES + 5])
def test_any_other_bytes_have_another_checksum(size_bytes):
    data = bytearray(random.Random(4).randbytes(size_bytes))
    before = checksum_of(data)
    for offset in {0, size_bytes // 2, size_bytes - 1}:
        data[offset] ^= 0x10
        assert checksum_of(data) != before
        data[offset] ^= 0x10
    assert checksum_of(data) == before
    assert checksum_of(data + b"\0") != before
    assert checksum_of(data[:-1]) != before
