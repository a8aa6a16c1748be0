"""Packing while an image is built: a tensor's weights come in chunks and leave as pieces.

It owns memory for one piece, and the moving together of pieces once their sizes are known. It
never reads a checkpoint. How small a piece gets shows only when it is packed, and tensors are built
in any order, so each is written where it would lie if none were packed, and afterwards all move
down. Invariant: what is moved never lands on what is still to be moved.
"""

from __future__ import annotations

import os

import numpy as np

from swap.checksum import TensorHasher
from swap.image import TENSOR_ALIGNMENT_BYTES, Manifest, TensorEntry, segment_bytes
from swap.packing import WEIGHT_BYTES, pack
from swap.pieces import place_pieces
from swap.segment import Segment
from swap.writing import write_all

MOVE_BYTES = 8 << 20


class PieceWriter:
    """Packs one tensor into a segment; `stored_offset` is where the layout has its first piece."""

    def __init__(
        self, descriptor: int, entry: TensorEntry, stored_offset: int, piece_weights: int
    ) -> None:
        self._descriptor = descriptor
        self._position = stored_offset
        piece_bytes = min(piece_weights * WEIGHT_BYTES, entry.size_bytes)
        self._buffer = np.empty(piece_bytes, np.uint8)
        self._filled = 0
        self.stored_checksum = ""
        """Of all pieces; known once finished."""
        self._sizes: list[int] = []
        self._hasher = TensorHasher()

    def write(self, chunk: memoryview) -> None:
        """Take the next bytes of the tensor, in chunks of any size."""
        rest = np.frombuffer(chunk, np.uint8)
        while len(rest):
            count = min(len(rest), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == len(self._buffer):
                self._write_piece()

    def finish(self) -> tuple[int, ...]:
        """Write what is left; returns the bytes of every piece."""
        if self._filled:
            self._write_piece()
        self.stored_checksum = self._hasher.checksum()
        return tuple(self._sizes)

    def _write_piece(self) -> None:
        raw = self._buffer[: self._filled]
        packed = pack(raw.view(np.uint16))
        stored = raw if packed is None else packed
        write_all(self._descriptor, stored.data, self._position)
        # Between pieces lie zeros, once they have moved together.
        self._hasher.update(bytes(-sum(self._sizes[-1:]) % TENSOR_ALIGNMENT_BYTES))
        self._hasher.update(stored.data)
        self._sizes.append(len(stored))
        # Only a tensor's last piece is short, so that the next starts where the layout has it.
        self._position += self._filled
        self._filled = 0


def close_gaps(segment: Segment, layout: Manifest, manifest: Manifest) -> None:
    """Move every piece from where `layout` has it to where `manifest` does, first to last.

    The segment is cut to what the image takes, and what is in it besides the pieces is zeros.
    """
    descriptor = segment.descriptor
    for before, after in zip(place_pieces(layout), place_pieces(manifest), strict=True):
        distance = before.stored_offset_bytes - after.stored_offset_bytes
        assert distance >= 0, "a piece is larger than its weights"
        end = after.stored_offset_bytes + after.stored_bytes
        for start in range(after.stored_offset_bytes if distance else end, end, MOVE_BYTES):
            data = os.pread(descriptor, min(MOVE_BYTES, end - start), start + distance)
            write_all(descriptor, data, start)
        write_all(descriptor, bytes(-after.stored_bytes % TENSOR_ALIGNMENT_BYTES), end)
    segment.truncate(manifest.stored_bytes)
    segment.truncate(segment_bytes(manifest))
