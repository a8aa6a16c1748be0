"""Checking that what arrived on the device is what the image holds.

Owns the choice of a sample, bounded in bytes and so in milliseconds, and the comparison. It never
repairs anything. Small tensors are compared with the checksums in the manifest, which also shows
that the host's copy is what was built; pieces spread evenly over all weights, the large tensors'
among them, are compared with the host's copy byte by byte. The image's layout was checked against
its digest when it was attached. All of the sample is read back at once. It depends on `salt`, so
that every exchange draws another.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Sequence

from engine.worker.images import Image
from swap.device import DeviceMemory
from swap.errors import CorruptWeights
from swap.image import Manifest, TensorEntry, checksum_of

CHECKSUM_BYTES_MAX = 2 << 20
"""Hashed at most: about a millisecond's worth."""
PIECES = 256
PIECE_BYTES = 4096


def verify_weights(device: DeviceMemory, image: Image, address: int, salt: str) -> None:
    """Compare a sample of the weights at `address` with their image. Raises CorruptWeights."""
    draw = random.Random(f"{image.digest}{salt}")
    tensors = sampled_tensors(image.manifest, draw)
    pieces = sampled_pieces(image.manifest.weights_bytes, draw)
    wanted = [*((entry.offset_bytes, entry.size_bytes) for entry in tensors), *pieces]
    found = read_back(device, address, wanted)
    for entry, here in zip(tensors, found, strict=False):
        if checksum_of(hashlib.sha256(here)) != entry.checksum:
            raise _corrupt(image, f"tensor {entry.name} does not match its checksum")
    for (offset, count), here in zip(pieces, found[len(tensors) :], strict=True):
        if bytes(here) != bytes(image.source.view(offset, count)):
            raise _corrupt(image, f"bytes {offset} to {offset + count} differ from the host's copy")


def read_back(
    device: DeviceMemory, address: int, wanted: Sequence[tuple[int, int]]
) -> list[memoryview]:
    """What the device has at each (offset from `address`, bytes)."""
    buffer = ctypes.create_string_buffer(sum(count for _, count in wanted))
    start, view, found = ctypes.addressof(buffer), memoryview(buffer).cast("B"), []
    at = 0
    for offset, count in wanted:
        device.copy_out(start + at, address + offset, count)
        found.append(view[at : at + count])
        at += count
    device.synchronize()
    return found


def sampled_tensors(manifest: Manifest, draw: random.Random) -> list[TensorEntry]:
    """Tensors in random order for as long as they fit CHECKSUM_BYTES_MAX together."""
    chosen: list[TensorEntry] = []
    left = CHECKSUM_BYTES_MAX
    for entry in draw.sample(manifest.tensors, len(manifest.tensors)):
        if entry.size_bytes <= left:
            chosen.append(entry)
            left -= entry.size_bytes
    return chosen


def sampled_pieces(weights_bytes: int, draw: random.Random) -> list[tuple[int, int]]:
    """(offset, bytes) of one piece in each of PIECES equal stretches, the last bytes included."""
    count = min(PIECE_BYTES, weights_bytes)
    stretch = max(weights_bytes // PIECES, count)
    starts = range(0, weights_bytes - count + 1, stretch)
    pieces = [
        (min(start + draw.randrange(stretch), weights_bytes - count), count) for start in starts
    ]
    return [*pieces, (weights_bytes - count, count)]


def _corrupt(image: Image, what: str) -> CorruptWeights:
    return CorruptWeights(
        f"image {image.digest[:12]} did not arrive whole on the device: {what}; if it recurs, "
        "build the image again and check the memory",
        digest=image.digest,
    )
