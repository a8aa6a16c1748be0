"""The blocks of an image that is read back, each to be checked by whoever has just read it.

It owns the division of an image, as it is stored, into blocks (of a tensor, as its checksum counts
them, or of the gaps between tensors, which are zeros) and the account of which are right. A packed
tensor is held against the checksum of what is stored. It never reads and never waits. Invariant:
once every block was taken, each tensor has its checksum, or an error was raised.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from swap.checksum import BLOCK_BYTES, block_digest, checksum_of_blocks
from swap.errors import CorruptWeights
from swap.image import Manifest
from swap.pieces import place_pieces


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `start` to `end` of the image; block `number` of tensor `tensor`, or -1: of a gap."""

    start: int
    end: int
    tensor: int
    number: int


class BlockCheck:
    """The account of one image. `take` may be called from several threads at once."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        self._manifest = manifest
        self._name = name
        self._spans = _stored_spans(manifest)
        counts = [-(-(end - start) // BLOCK_BYTES) for start, end in self._spans]
        self._digests = [[b""] * count for count in counts]
        self._missing = counts
        self._lock = threading.Lock()

    def units(self, bytes_max: int) -> Iterator[tuple[Block, ...]]:
        """All blocks in order, in runs of at most `bytes_max`, but of one block at least."""
        unit: list[Block] = []
        for block in self._blocks():
            if unit and block.end - unit[0].start > bytes_max:
                yield tuple(unit)
                unit = []
            unit.append(block)
        if unit:
            yield tuple(unit)

    def take(self, block: Block, view: memoryview) -> None:
        """Check a block's bytes. Raises CorruptWeights naming what is not what was written."""
        if block.tensor < 0:
            if view.tobytes().count(0) != len(view):
                raise CorruptWeights(
                    f"bytes {block.start} to {block.end} of the cached image {self._name}, which "
                    "lie between tensors, are not zero",
                    digest=self._manifest.digest,
                )
            return
        digest = block_digest(view)
        with self._lock:
            digests = self._digests[block.tensor]
            digests[block.number] = digest
            self._missing[block.tensor] -= 1
            if self._missing[block.tensor]:
                return
        entry = self._manifest.tensors[block.tensor]
        expected = entry.stored_checksum if self._manifest.packed else entry.checksum
        if checksum_of_blocks(digests) != expected:
            raise CorruptWeights(
                f"tensor {entry.name} in the cached image {self._name} is not what was written",
                tensor=entry.name,
                digest=self._manifest.digest,
            )

    def _blocks(self) -> Iterator[Block]:
        position = 0
        for index, (first, end) in enumerate(self._spans):
            if first == end:  # a tensor of no bytes
                continue
            yield from _gap(position, first)
            for number, start in enumerate(range(first, end, BLOCK_BYTES)):
                yield Block(start, min(start + BLOCK_BYTES, end), index, number)
            position = end
        yield from _gap(position, self._manifest.stored_bytes)


def _stored_spans(manifest: Manifest) -> list[tuple[int, int]]:
    """Where each tensor's bytes start and end in the segment."""
    if not manifest.packed:
        return [(one.offset_bytes, one.offset_bytes + one.size_bytes) for one in manifest.tensors]
    spans = {entry.name: (0, 0) for entry in manifest.tensors}
    for piece in place_pieces(manifest):
        start, end = spans[piece.tensor.name]
        first = start if end else piece.stored_offset_bytes
        spans[piece.tensor.name] = (first, piece.stored_offset_bytes + piece.stored_bytes)
    return list(spans.values())


def _gap(start: int, end: int) -> Iterator[Block]:
    for position in range(start, end, BLOCK_BYTES):
        yield Block(position, min(position + BLOCK_BYTES, end), -1, 0)
