"""Where every piece of a packed image lies in its segment, and where its weights go on the device.

It owns the placement and nothing else: pure functions over a manifest. Pieces lie in the order of
their tensors, each at a multiple of 256 bytes. On the device the stored bytes arrive at the end of
the region that the weights will fill, and are unpacked from the front: by the time weights are
written where stored bytes lie, those have been unpacked. Invariant: with `device_bytes` of room, no
piece's weights reach into that piece or a later one, so that copying may run ahead at will, and
unpacking takes no memory of its own but the length of a piece or so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swap.image import TENSOR_ALIGNMENT_BYTES, Manifest, TensorEntry
from swap.packing import WEIGHT_BYTES, Piece, read_piece
from swap.segment import Mapping


@dataclass(frozen=True, slots=True)
class PlacedPiece:
    """One piece: `stored_bytes` at `stored_offset_bytes` become `weights` at `offset_bytes`."""

    tensor: TensorEntry
    stored_offset_bytes: int
    stored_bytes: int
    offset_bytes: int
    weights: int

    @property
    def weights_bytes(self) -> int:
        return self.weights * WEIGHT_BYTES

    @property
    def packed(self) -> bool:
        """Whether it has to be unpacked, rather than only moved."""
        return self.stored_bytes < self.weights_bytes


def place_pieces(manifest: Manifest) -> tuple[PlacedPiece, ...]:
    """All pieces, in the order in which they lie; none for an image that is not packed."""
    placed: list[PlacedPiece] = []
    stored_offset = 0
    for entry in manifest.tensors:
        left = entry.size_bytes // WEIGHT_BYTES
        for index, stored in enumerate(entry.pieces):
            offset = entry.offset_bytes + index * manifest.piece_weights * WEIGHT_BYTES
            weights = min(left, manifest.piece_weights)
            placed.append(PlacedPiece(entry, stored_offset, stored, offset, weights))
            left -= weights
            stored_offset += _round_up(stored, TENSOR_ALIGNMENT_BYTES)
    return tuple(placed)


def device_bytes(manifest: Manifest) -> int:
    """Device memory that bringing the weights in takes: those of a packed image, a little more.

    For a layout it is what the image takes at most: smaller pieces never take more.
    """
    stored = manifest.stored_bytes
    # When a piece is unpacked, there are the weights up to its end, and it and all behind it.
    needed = (
        piece.offset_bytes + piece.weights_bytes + stored - piece.stored_offset_bytes
        for piece in place_pieces(manifest)
    )
    return _round_up(max(manifest.weights_bytes, *needed, 0), TENSOR_ALIGNMENT_BYTES)


def arrival_offset_bytes(manifest: Manifest) -> int:
    """Where in the region the stored bytes of a packed image arrive: at its end."""
    return device_bytes(manifest) - manifest.stored_bytes


def read_placed(source: Mapping, placed: PlacedPiece) -> Piece:
    """A packed piece as it lies in a mapped segment. Raises CorruptWeights."""
    view = source.view(placed.stored_offset_bytes, placed.stored_bytes)
    return read_piece(np.frombuffer(view, np.uint8), placed.weights)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
