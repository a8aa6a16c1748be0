"""Checking that what arrived on the device is what the image holds.

Owns the choice of a sample, bounded in bytes and so in milliseconds, and the comparison. It never
repairs anything. Small tensors are compared with the checksums in the manifest, which also shows
that the host's copy is what was built; pieces spread evenly over all weights, the large tensors'
among them, are compared with the host's copy byte by byte, of a packed image with blocks of it
unpacked. The image's layout was checked against its digest when it was attached. All of the sample
is read back at once. It depends on `salt`, so that every exchange draws another.

What that finds: of W bytes of weights a plain image's pieces cover about PIECES * PIECE_BYTES, so
that one byte that is wrong in a large tensor is found with probability 1 MiB / W (all of it in an
image of 1 MiB, one in 15,000 of 16 GB). A stretch of L bytes that did not arrive, or arrived
elsewhere, is found with about (L + PIECE_BYTES) * PIECES / W while that is small, three times of
four where L is W / PIECES (a page of 64 MiB of 16 GB), and surely where it is twice that. Of a
packed image BLOCKS blocks of BLOCK_WEIGHTS are compared instead. A sample is against copies that
went wrong; single bits are the memory's own checks' (ECC), and show in a canary if anywhere.
"""

from __future__ import annotations

import bisect
import ctypes
import random
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate

from engine.worker.images import Image
from swap.checksum import TensorHasher, checksum_of
from swap.device import DeviceMemory
from swap.errors import CorruptWeights
from swap.image import Manifest, TensorEntry
from swap.image_check import READ_BYTES, unpacked
from swap.packing import BLOCK_WEIGHTS, WEIGHT_BYTES, unpack
from swap.pieces import PlacedPiece, pieces_by_tensor, place_pieces, read_placed

CHECKSUM_BYTES_MAX = 2 << 20
"""Hashed at most: about a millisecond's worth."""
PIECES = 256
PIECE_BYTES = 4096
BLOCKS = 64
"""Of a packed image, unpacked for comparison: a few milliseconds' worth."""


def verify_weights(device: DeviceMemory, image: Image, address: int, salt: str) -> None:
    """Compare a sample of the weights at `address` with their image. Raises CorruptWeights."""
    draw = random.Random(f"{image.digest}{salt}")
    tensors = sampled_tensors(image.manifest, draw)
    expected = expected_pieces(image, draw)
    pieces = [(offset, len(there)) for offset, there in expected]
    wanted = [*((entry.offset_bytes, entry.size_bytes) for entry in tensors), *pieces]
    found = read_back(device, address, wanted)
    for entry, here in zip(tensors, found, strict=False):
        if checksum_of(here) != entry.checksum:
            raise _corrupt(image, f"tensor {entry.name} does not match its checksum")
    for (offset, there), here in zip(expected, found[len(tensors) :], strict=True):
        if bytes(here) != there:
            end = offset + len(there)
            raise _corrupt(image, f"bytes {offset} to {end} differ from the host's copy")


def verify_host(image: Image, stop: threading.Event) -> bool:
    """Compare all of the host's copy with its checksums; False when stopped before the end. Takes
    about a second a gigabyte. Raises CorruptWeights."""
    pieces = pieces_by_tensor(image.manifest)
    for entry in image.manifest.tensors:
        hasher = TensorHasher()
        for data in _host_pieces(image, entry, pieces[entry.name]):
            if stop.is_set():
                return False
            hasher.update(data)
        if hasher.checksum() != entry.checksum:
            raise CorruptWeights(
                f"tensor {entry.name} of image {image.digest[:12]} does not match its checksum",
                tensor=entry.name,
                digest=image.digest,
            )
    return True


def _host_pieces(
    image: Image, entry: TensorEntry, pieces: Sequence[PlacedPiece]
) -> Iterator[memoryview]:
    """A tensor's weights in the host's copy, in order; `pieces` are its own, if it is packed."""
    if image.manifest.packed:
        for piece in pieces:
            stored = image.source.view(piece.stored_offset_bytes, piece.stored_bytes)
            yield unpacked(stored, piece.weights)
        return
    end = entry.offset_bytes + entry.size_bytes
    for start in range(entry.offset_bytes, end, READ_BYTES):
        yield image.source.view(start, min(READ_BYTES, end - start))


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


def expected_pieces(image: Image, draw: random.Random) -> list[tuple[int, bytes]]:
    """(offset, the bytes that must be there) of pieces spread evenly over all weights."""
    if not image.manifest.packed:
        pieces = sampled_pieces(image.manifest.weights_bytes, draw)
        return [(offset, bytes(image.source.view(offset, count))) for offset, count in pieces]
    placed = place_pieces(image.manifest)
    ends = list(accumulate(piece.weights for piece in placed))
    expected = []
    for start, _ in sampled_pieces(ends[-1] if ends else 0, draw, BLOCKS):
        index = bisect.bisect_right(ends, start)
        if index < len(placed):
            piece = placed[index]
            block = (start - ends[index] + piece.weights) // BLOCK_WEIGHTS
            expected.append(_expected_block(image, piece, block))
    return expected


def _expected_block(image: Image, piece: PlacedPiece, block: int) -> tuple[int, bytes]:
    first = block * BLOCK_WEIGHTS * WEIGHT_BYTES
    offset = piece.offset_bytes + first
    if piece.packed:
        return offset, unpack(read_placed(image.source, piece), block, 1).tobytes()
    count = min(BLOCK_WEIGHTS * WEIGHT_BYTES, piece.weights_bytes - first)
    return offset, bytes(image.source.view(piece.stored_offset_bytes + first, count))


def sampled_tensors(manifest: Manifest, draw: random.Random) -> list[TensorEntry]:
    """Tensors in random order for as long as they fit CHECKSUM_BYTES_MAX together."""
    chosen: list[TensorEntry] = []
    left = CHECKSUM_BYTES_MAX
    for entry in draw.sample(manifest.tensors, len(manifest.tensors)):
        if entry.size_bytes <= left:
            chosen.append(entry)
            left -= entry.size_bytes
    return chosen


def sampled_pieces(
    weights_bytes: int, draw: random.Random, pieces_max: int = PIECES
) -> list[tuple[int, int]]:
    """(offset, bytes) of one piece in each of PIECES equal stretches, the last bytes included."""
    count = min(PIECE_BYTES, weights_bytes)
    stretch = max(weights_bytes // pieces_max, count, 1)
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
