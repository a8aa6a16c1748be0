"""Where every piece of a packed image lies in its segment, and where its weights go on the device.

It owns the placement and nothing else: pure functions over a manifest. Pieces lie in the order of
their tensors, each at a multiple of 256 bytes. On the device the stored bytes arrive at the end of
the region that the weights will fill, and are unpacked from the front: by the time weights are
written where stored bytes lie, those have been unpacked. Invariant: with `device_bytes` of room, no
piece's weights reach into that piece or a later one, so that copying may run ahead at will, and
unpacking takes no memory of its own but the length of a piece or so.
"""

from __future__ import annotations

import bisect
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


def pieces_by_tensor(manifest: Manifest) -> dict[str, list[PlacedPiece]]:
    """The pieces of each tensor, by its name, in order."""
    found: dict[str, list[PlacedPiece]] = {entry.name: [] for entry in manifest.tensors}
    for piece in place_pieces(manifest):
        found[piece.tensor.name].append(piece)
    return found


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


@dataclass(frozen=True, slots=True)
class PieceRun:
    """Pieces that one transfer brings in: `first` to before `last`, of all stored bytes those from
    `start_bytes` to `end_bytes`.

    Stored byte n of the image arrives at `arrival_offset_bytes + n` of the region, of which
    `room_bytes` are needed.
    """

    first: int
    last: int
    start_bytes: int
    end_bytes: int
    arrival_offset_bytes: int
    room_bytes: int


def run_of(manifest: Manifest, there_bytes: int, wanted_bytes: int) -> PieceRun:
    """The pieces between the weights' first `there_bytes`, which are there and whole pieces, and
    their first `wanted_bytes`, and the least room in which they can be unpacked."""
    pieces = place_pieces(manifest)
    first = sum(piece.offset_bytes < there_bytes for piece in pieces)
    last = sum(piece.offset_bytes < wanted_bytes for piece in pieces)
    if last <= first:
        return PieceRun(first, first, 0, 0, 0, 0)
    run, start = pieces[first:last], pieces[first].stored_offset_bytes
    if last == len(pieces):
        whole_bytes, end = device_bytes(manifest), manifest.stored_bytes
        return PieceRun(first, last, start, end, whole_bytes - end, whole_bytes)
    # As for all of them: the weights up to a piece's end, and it and all behind it.
    needed = max(each.offset_bytes + each.weights_bytes - each.stored_offset_bytes for each in run)
    arrival, end = _round_up(needed, TENSOR_ALIGNMENT_BYTES), pieces[last].stored_offset_bytes
    return PieceRun(first, last, start, end, arrival, arrival + end)


def run_within(manifest: Manifest, there_bytes: int, room_bytes: int) -> PieceRun:
    """As many pieces behind the weights' first `there_bytes` as can be unpacked in a region of
    `room_bytes`."""
    ends = [piece.offset_bytes + 1 for piece in place_pieces(manifest)]
    count = bisect.bisect_right(
        ends, room_bytes, key=lambda wanted: run_of(manifest, there_bytes, wanted).room_bytes
    )
    return run_of(manifest, there_bytes, ends[count - 1] if count else 0)


def unpacking_bytes(manifest: Manifest) -> int:
    """Device memory that bringing in any first part of the weights takes beside them, at most: the
    last piece, whole, and its stored bytes."""
    return 2 * manifest.piece_weights * WEIGHT_BYTES if manifest.packed else 0


def stored_bytes_behind(manifest: Manifest, there_bytes: int) -> int:
    """Stored bytes of the pieces behind the weights' first `there_bytes`."""
    behind = (each for each in place_pieces(manifest) if each.offset_bytes >= there_bytes)
    return manifest.stored_bytes - next(behind).stored_offset_bytes


def whole_pieces_bytes(manifest: Manifest, weights_bytes: int) -> int:
    """Of the first `weights_bytes`, those in front of the first piece that is not all there; of
    less than all weights, with what fills them up, the last piece never is."""
    if weights_bytes >= manifest.weights_bytes:
        return manifest.weights_bytes
    pieces = place_pieces(manifest)
    return next(
        (
            one.offset_bytes
            for one in pieces
            if one.offset_bytes + one.weights_bytes > weights_bytes
        ),
        pieces[-1].offset_bytes,
    )


def read_placed(source: Mapping, placed: PlacedPiece) -> Piece:
    """A packed piece as it lies in a mapped segment. Raises CorruptWeights."""
    view = source.view(placed.stored_offset_bytes, placed.stored_bytes)
    return read_piece(np.frombuffer(view, np.uint8), placed.weights)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
