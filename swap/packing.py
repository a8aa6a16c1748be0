"""Packed bfloat16: sign and mantissa as they are, exponents as codes; exact to the bit.

It owns the format of one piece of packed weights, its exact size, and the reference for unpacking;
it never knows which tensor it handles. Exponents of weights take few values, so a piece names its
7 or 15 commonest and writes each weight's as a code of 3 or 4 bits. The code that is left over is
the escape: such an exponent follows as a byte of its own, found by counting the escapes before it
in its block. A piece is, in this order, each part at a multiple of 64 bytes:

    header      magic, bits of a code, weights, exceptions, table of exponents
    offsets     uint32 for every block and the end: where the block's exceptions start
    signs       a byte for every weight: sign (1 bit), mantissa (7)
    codes       4 bits: two to a byte, the earlier one low. 3 bits: a plane of the low two bits,
                four to a byte, then a plane of the high bits, eight to a byte
    exceptions  a byte each

Signs and codes are filled up with zeros to whole blocks. Invariant: whatever `read_piece` returns
can be unpacked without a look at bytes outside it, whoever wrote it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swap.errors import CorruptWeights
from swap.image import BLOCK_WEIGHTS as BLOCK_WEIGHTS
from swap.image import WEIGHT_BYTES as WEIGHT_BYTES

PART_ALIGNMENT_BYTES = 64
CODE_BITS = (3, 4)
TILE_WEIGHTS = 16 * BLOCK_WEIGHTS
"""Packed at once: what is made of so many on the way stays in a core's own cache."""
COUNTED_WEIGHTS = 8 * TILE_WEIGHTS
"""Counted at once: the counts themselves are half a megabyte."""

_HEADER = struct.Struct("<4sBxxxII16s")
_MAGIC = b"HBP1"
TABLE_OFFSET_BYTES = 16
"""Where in a piece its table of exponents starts."""

Bytes = NDArray[np.uint8]
Weights = NDArray[np.uint16]


@dataclass(frozen=True)
class Piece:
    """A piece that was found sound. The arrays are views of what was read.

    For B blocks: `offsets` [B + 1], `signs` [B * 4096], `codes` [B * 4096 * code_bits / 8],
    `exceptions` [offsets[B]]; `table` [2 ** code_bits], its last entry without meaning.
    """

    weights: int
    code_bits: int
    table: Bytes
    offsets: NDArray[np.uint32]
    signs: Bytes
    codes: Bytes
    exceptions: Bytes

    @property
    def escape(self) -> int:
        return (1 << self.code_bits) - 1

    @property
    def size_bytes(self) -> int:
        return packed_bytes(self.weights, len(self.exceptions), self.code_bits)

    @property
    def part_offsets_bytes(self) -> tuple[int, int, int, int]:
        """Where in the piece its offsets, signs, codes and exceptions start."""
        parts = _parts(self.weights, len(self.exceptions), self.code_bits)
        return parts.offsets, parts.signs, parts.codes, parts.exceptions


@dataclass(frozen=True)
class _Parts:
    """Where the parts of a piece start, and where it ends."""

    offsets: int
    signs: int
    codes: int
    exceptions: int
    end: int


def packed_bytes(weights: int, exceptions: int, code_bits: int) -> int:
    """Exactly how many bytes a piece takes."""
    return _parts(weights, exceptions, code_bits).end


def pack(weights: Weights) -> Bytes | None:
    """Pack bfloat16 bits with whichever codes take less; None when that is no less than raw."""
    counts = _count_exponents(weights)
    # Commonest first; of equally common ones the smaller, so that packing is the same every time.
    ranked = np.argsort(-counts, kind="stable")
    sizes = {}
    for bits in CODE_BITS:
        exceptions = len(weights) - int(counts[ranked[: (1 << bits) - 1]].sum())
        sizes[packed_bytes(len(weights), exceptions, bits)] = (bits, exceptions)
    size = min(sizes)
    if size >= len(weights) * WEIGHT_BYTES:
        return None
    bits, exceptions = sizes[size]
    packed = np.zeros(size, np.uint8)
    table = ranked[: (1 << bits) - 1].astype(np.uint8)
    header = _HEADER.pack(_MAGIC, bits, len(weights), exceptions, table.tobytes())
    packed[: _HEADER.size] = np.frombuffer(header, np.uint8)
    _pack_parts(weights, packed, table, _parts(len(weights), exceptions, bits))
    return packed


def _count_exponents(weights: Weights) -> NDArray[np.int64]:
    """How many weights have each exponent. Counted by twos: there are half as many."""
    pairs = np.zeros(1 << 16, np.int64)
    for start in range(0, len(weights), COUNTED_WEIGHTS):
        exponents = (weights[start : start + COUNTED_WEIGHTS] >> np.uint16(7)).astype(np.uint8)
        even = len(exponents) // 2 * 2
        pairs += np.bincount(exponents[:even].view(np.uint16), minlength=1 << 16)
    square = pairs.reshape(256, 256)
    counts: NDArray[np.int64] = square.sum(axis=0) + square.sum(axis=1)
    if len(weights) % 2:
        counts[int(weights[-1] >> np.uint16(7)) & 0xFF] += 1
    return counts


def _pack_parts(weights: Weights, packed: Bytes, table: Bytes, parts: _Parts) -> None:
    """Write a piece's parts behind its header, tile by tile."""
    escape = len(table)
    bits = escape.bit_length()
    coding = np.full(256, escape, np.uint8)
    coding[table] = np.arange(escape, dtype=np.uint8)
    filled = parts.codes - parts.signs
    high_plane = parts.codes + filled // 4
    found: list[NDArray[np.intp]] = []
    position = parts.exceptions
    for start in range(0, len(weights), TILE_WEIGHTS):
        tile = weights[start : start + TILE_WEIGHTS]
        exponents = (tile >> np.uint16(7)).astype(np.uint8)
        signs = packed[parts.signs + start : parts.signs + start + len(tile)]
        np.bitwise_or((tile >> np.uint16(8)) & 0x80, tile & 0x7F, out=signs, casting="unsafe")
        end = min(start + TILE_WEIGHTS, filled)
        codes = np.zeros(end - start, np.uint8)
        np.take(coding, exponents, out=codes[: len(tile)], mode="clip")
        escaped = codes == escape
        found.append(np.count_nonzero(escaped.reshape(-1, BLOCK_WEIGHTS), axis=1))
        exceptions = exponents[escaped[: len(tile)]]
        packed[position : position + len(exceptions)] = exceptions
        position += len(exceptions)
        if bits == 4:
            place = packed[parts.codes + start // 2 : parts.codes + end // 2]
            np.bitwise_or(codes[0::2], codes[1::2] << np.uint8(4), out=place)
        else:
            low = packed[parts.codes + start // 4 : parts.codes + end // 4]
            low[:] = _low_plane(codes)
            high = packed[high_plane + start // 8 : high_plane + end // 8]
            high[:] = np.packbits(codes >> np.uint8(2), bitorder="little")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(found))]).astype("<u4")
    packed[parts.offsets : parts.offsets + offsets.nbytes] = offsets.view(np.uint8)


def read_piece(data: Bytes, weights: int) -> Piece:
    """The parts of a piece of `weights` weights, checked against its size and one another.

    `data` is all of it, and starts at a multiple of 4 bytes. Raises CorruptWeights.
    """
    if len(data) < _HEADER.size:
        raise _corrupt(f"it has {len(data)} bytes")
    magic, bits, count, exceptions, table = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != _MAGIC or bits not in CODE_BITS:
        raise _corrupt("it does not start as one")
    if count != weights:
        raise _corrupt(f"it has {count} weights, where there should be {weights}")
    parts = _parts(weights, exceptions, bits)
    if exceptions > weights or parts.end != len(data):
        raise _corrupt(
            f"{weights} weights with {exceptions} exceptions take {parts.end} bytes, and it has "
            f"{len(data)}"
        )
    blocks = _blocks(weights)
    offsets = data[parts.offsets : parts.offsets + 4 * (blocks + 1)].view(np.dtype("<u4"))
    if offsets[0] != 0 or offsets[-1] != exceptions or np.any(offsets[1:] < offsets[:-1]):
        raise _corrupt("its exceptions do not follow one another")
    return Piece(
        weights=weights,
        code_bits=bits,
        table=np.frombuffer(table, np.uint8)[: 1 << bits],
        offsets=offsets,
        signs=data[parts.signs : parts.signs + blocks * BLOCK_WEIGHTS],
        codes=data[parts.codes : parts.codes + blocks * BLOCK_WEIGHTS * bits // 8],
        exceptions=data[parts.exceptions :],
    )


def unpack(piece: Piece, first_block: int = 0, blocks: int | None = None) -> Weights:
    """The weights of some blocks, or of all: the reference that fast ways are held to.

    Raises CorruptWeights when a block has more escapes than exceptions, or fewer.
    """
    end_block = len(piece.offsets) - 1 if blocks is None else first_block + blocks
    start, end = first_block * BLOCK_WEIGHTS, end_block * BLOCK_WEIGHTS
    codes = _codes_of(piece, start, end)
    escaped = codes == piece.escape
    found = np.count_nonzero(escaped.reshape(-1, BLOCK_WEIGHTS), axis=1)
    bounds = piece.offsets[first_block : end_block + 1]
    if np.any(found != np.diff(bounds)):
        raise wrong_exceptions()
    exponents = piece.table[codes].astype(np.uint16)
    exponents[escaped] = piece.exceptions[int(bounds[0]) : int(bounds[-1])]
    signs = piece.signs[start:end].astype(np.uint16)
    weights: Weights = (signs & np.uint16(0x80)) << np.uint16(8)
    weights |= exponents << np.uint16(7)
    weights |= signs & np.uint16(0x7F)
    return weights[: piece.weights - start]


def wrong_exceptions() -> CorruptWeights:
    """What is raised for a block whose escapes are not as many as its exceptions."""
    return _corrupt("a block has another number of escapes than of exceptions")


def _low_plane(codes: Bytes) -> Bytes:
    """The low two bits of every code, four codes to a byte."""
    plane = codes[0::4] & np.uint8(3)
    for place in range(1, 4):
        plane |= (codes[place::4] & np.uint8(3)) << np.uint8(2 * place)
    return plane


def _codes_of(piece: Piece, start: int, end: int) -> Bytes:
    codes = np.empty(end - start, np.uint8)
    if piece.code_bits == 4:
        pairs = piece.codes[start // 2 : end // 2]
        codes[0::2], codes[1::2] = pairs & 15, pairs >> 4
        return codes
    high_plane = len(piece.signs) // 4
    low = piece.codes[start // 4 : end // 4]
    for place in range(4):
        codes[place::4] = (low >> (2 * place)) & 3
    high = piece.codes[high_plane + start // 8 : high_plane + end // 8]
    codes |= np.unpackbits(high, bitorder="little") << 2
    return codes


def _parts(weights: int, exceptions: int, code_bits: int) -> _Parts:
    blocks = _blocks(weights)
    offsets = _aligned(_HEADER.size)
    signs = offsets + _aligned(4 * (blocks + 1))
    codes = signs + blocks * BLOCK_WEIGHTS
    end_of_codes = codes + blocks * BLOCK_WEIGHTS * code_bits // 8
    return _Parts(offsets, signs, codes, end_of_codes, end_of_codes + exceptions)


def _blocks(weights: int) -> int:
    return -(-weights // BLOCK_WEIGHTS)


def _aligned(size: int) -> int:
    return -(-size // PART_ALIGNMENT_BYTES) * PART_ALIGNMENT_BYTES


def _corrupt(what: str) -> CorruptWeights:
    return CorruptWeights(f"a piece of packed weights is damaged: {what}; build the image again")
