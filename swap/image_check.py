"""Reading a whole image back and comparing it with its checksums, without a device.

It owns memory for one piece at a time. It never repairs and never samples: that is for a swap, this
is for whoever must know that an image is what was built.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from swap.checksum import TensorHasher
from swap.errors import CorruptWeights
from swap.image import Manifest, TensorEntry
from swap.packing import WEIGHT_BYTES, read_piece, unpack
from swap.pieces import pieces_by_tensor

READ_BYTES = 8 << 20


def verify_image(descriptor: int, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare tensors (all, or those named) with their checksums, reading from the segment.

    Raises CorruptWeights.
    """
    wanted = None if names is None else frozenset(names)
    pieces = pieces_by_tensor(manifest)
    for entry in manifest.tensors:
        if wanted is not None and entry.name not in wanted:
            continue
        hasher = TensorHasher()
        if manifest.packed:
            for piece in pieces[entry.name]:
                stored = _read(descriptor, entry, piece.stored_offset_bytes, piece.stored_bytes)
                hasher.update(unpacked(stored, piece.weights))
        else:
            for data in _chunks(descriptor, entry):
                hasher.update(data)
        if hasher.checksum() != entry.checksum:
            raise CorruptWeights(
                f"tensor {entry.name} of image {manifest.digest[:12]} is not what was built: "
                "build the image again",
                tensor=entry.name,
                digest=manifest.digest,
            )


def unpacked(data: bytearray | memoryview, weights: int) -> memoryview:
    """The weights of a piece as it is stored, packed or not. Raises CorruptWeights."""
    stored = np.frombuffer(data, np.uint8)
    if len(stored) == weights * WEIGHT_BYTES:
        return stored.data
    return unpack(read_piece(stored, weights)).data


def _chunks(descriptor: int, entry: TensorEntry) -> Iterator[bytearray]:
    end = entry.offset_bytes + entry.size_bytes
    for position in range(entry.offset_bytes, end, READ_BYTES):
        yield _read(descriptor, entry, position, min(READ_BYTES, end - position))


def _read(descriptor: int, entry: TensorEntry, offset: int, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise CorruptWeights(f"the segment ends within tensor {entry.name}")
        view, offset = view[got:], offset + got
    return data
