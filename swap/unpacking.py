"""Unpacking on the host: tables instead of bit by bit, in buffers that are kept.

It owns the Protocol of whatever unpacks pieces on a device, and the implementation over ordinary
memory. It never decides which piece goes where. A group of codes indexes a table that holds the
exponents of the whole group in their places, so that one look-up yields several weights; the work
runs in tiles that stay in the cache. Invariant: nothing outside the piece is read and nothing
outside its weights is written, whatever the piece holds.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swap.packing import (
    BLOCK_WEIGHTS,
    WEIGHT_BYTES,
    Bytes,
    Piece,
    Weights,
    read_piece,
    wrong_exceptions,
)
from swap.virtual_memory import view_of

TILE_BLOCKS = 16
"""Blocks unpacked at once: 64 Ki weights, some 0.5 MB of buffers."""


class Unpacker(Protocol):
    """What turns pieces that have arrived on the device into weights, in the order in which they
    are begun. For one thread; as with copies, a piece has a number to wait by."""

    @property
    def pieces_ahead(self) -> int:
        """Pieces worth beginning while an earlier one is unpacked; 0 where to begin one is to do
        it."""

    def unpack(self, piece: Piece, source: int, destination: int) -> int:
        """Begin to write the piece's weights to device address `destination`; returns its number.

        `piece` describes it, by the host's copy; its bytes are on the device, at `source`. Raises
        CorruptWeights where it is found here already that they are not sound.
        """

    def move(self, source: int, destination: int, size_bytes: int) -> int:
        """Begin to copy weights that came as they are to another place, which does not overlap."""

    def wait(self, number: int) -> None:
        """Wait until that piece, and so all before it, is complete."""

    def check(self) -> None:
        """Wait for all that was begun. Raises CorruptWeights when any of it was not sound."""


class HostUnpacker:
    """Unpacks with numpy, within the call. Raises CorruptWeights for escapes and exceptions that
    do not match."""

    pieces_ahead = 0

    def __init__(self) -> None:
        weights = TILE_BLOCKS * BLOCK_WEIGHTS
        self._tile: Weights = np.empty(weights, np.uint16)
        self._index: NDArray[np.intp] = np.empty(weights // 2, np.intp)
        self._found: NDArray[np.uint64] = np.empty(weights // 4, np.uint64)
        self._escapes: Bytes = np.empty(weights // 2, np.uint8)

    def unpack(self, piece: Piece, source: int, destination: int) -> int:
        """Reads what has arrived rather than the host's copy, and so checks it again."""
        arrived = np.frombuffer(view_of(source, piece.size_bytes), np.uint8)
        weights = np.frombuffer(view_of(destination, piece.weights * WEIGHT_BYTES), np.uint16)
        self.unpack_into(read_piece(arrived, piece.weights), weights)
        return 0

    def move(self, source: int, destination: int, size_bytes: int) -> int:
        view_of(destination, size_bytes)[:] = view_of(source, size_bytes)
        return 0

    def wait(self, number: int) -> None:
        """It was done when it was begun."""

    def check(self) -> None:
        """What was not sound was told at once."""

    def unpack_into(self, piece: Piece, weights: Weights) -> None:
        """Write all of a piece's weights, tile by tile."""
        tables = group_tables(piece)
        for start in range(0, piece.weights, TILE_BLOCKS * BLOCK_WEIGHTS):
            blocks = min(TILE_BLOCKS, len(piece.offsets) - 1 - start // BLOCK_WEIGHTS)
            count = min(blocks * BLOCK_WEIGHTS, piece.weights - start)
            if count == blocks * BLOCK_WEIGHTS:
                self._unpack_tile(piece, tables, start, weights[start : start + count])
            else:  # the filling of the last block is no weight
                tile = self._tile[: blocks * BLOCK_WEIGHTS]
                self._unpack_tile(piece, tables, start, tile)
                weights[start:] = tile[:count]

    def _unpack_tile(
        self, piece: Piece, tables: tuple[NDArray[np.generic], Bytes], start: int, out: Weights
    ) -> None:
        values, escapes = tables
        # A product with 257 has the byte twice: its sign on top, its mantissa below.
        np.multiply(piece.signs[start : start + len(out)], 0x101, out=out, dtype=np.uint16)
        np.bitwise_and(out, 0x807F, out=out)
        index = self._index_groups(piece, start, len(out))
        found = self._found.view(values.dtype)[: len(index)]
        np.take(values, index, out=found, mode="clip")
        grouped = out.view(values.dtype)
        np.bitwise_or(grouped, found, out=grouped)
        masks = self._escapes[: len(index)]
        np.take(escapes, index, out=masks, mode="clip")
        self._place_exceptions(piece, start, out, masks, len(out) // len(index))

    def _index_groups(self, piece: Piece, start: int, count: int) -> NDArray[np.intp]:
        if piece.code_bits == 4:
            index = self._index[: count // 2]
            index[:] = piece.codes[start // 2 : (start + count) // 2]
            return index
        index = self._index[: count // 4]
        high_plane = len(piece.signs) // 4
        high = piece.codes[high_plane + start // 8 : high_plane + (start + count) // 8]
        halves = index.reshape(-1, 2)
        np.bitwise_and(high, 15, out=halves[:, 0])
        np.right_shift(high, 4, out=halves[:, 1])
        index <<= 8
        index |= piece.codes[start // 4 : (start + count) // 4]
        return index

    @staticmethod
    def _place_exceptions(piece: Piece, start: int, out: Weights, masks: Bytes, group: int) -> None:
        first, blocks = start // BLOCK_WEIGHTS, len(out) // BLOCK_WEIGHTS
        bounds = piece.offsets[first : first + blocks + 1].astype(np.intp)
        groups = np.flatnonzero(masks)
        rows, places = np.nonzero((masks[groups, None] >> np.arange(group, dtype=np.uint8)) & 1)
        positions = groups[rows] * group + places
        starts = np.arange(blocks + 1) * BLOCK_WEIGHTS
        if np.any(np.searchsorted(positions, starts) != bounds - bounds[0]):
            raise wrong_exceptions()
        exponents = piece.exceptions[bounds[0] : bounds[-1]].astype(np.uint16)
        out[positions] |= exponents << np.uint16(7)


def group_tables(piece: Piece) -> tuple[NDArray[np.generic], Bytes]:
    """For every group of codes: its exponents in place, and which of its codes are escapes.

    Two codes of 4 bits are a group (a table of 256 by 32 bits); of 3 bits it is four, numbered by
    their low bits and, from bit 8 on, their high bits (4096 by 64 bits).
    """
    shifted = piece.table.astype(np.uint16) << np.uint16(7)
    shifted[piece.escape] = 0
    if piece.code_bits == 4:
        number = np.arange(256)
        codes = np.stack([number & 15, number >> 4], axis=1)
    else:
        number = np.arange(4096)
        codes = np.stack(
            [(number >> (2 * k)) & 3 | ((number >> (8 + k)) & 1) << 2 for k in range(4)], axis=1
        )
    values = np.ascontiguousarray(shifted[codes])
    wide = values.view(np.uint32 if piece.code_bits == 4 else np.uint64).reshape(-1)
    escapes = np.packbits(codes == piece.escape, axis=1, bitorder="little").reshape(-1)
    return wide, escapes
