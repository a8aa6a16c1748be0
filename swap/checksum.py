"""A tensor's checksum: BLAKE3 over the BLAKE3 digests of its blocks of 1 MiB, cut to 128 bits.

It owns the rule and nothing else; it reads no file and knows no image. Blocks are counted from the
tensor's first byte and hashed independently of each other, so that whoever reads pieces of a tensor
in any order, in several threads, hashes each block once it is there, while the next piece is still
on its way. BLAKE3 because the digest over a manifest names an image: what was altered on purpose
must not pass either, and it costs a third of SHA-256 even where the processor has instructions for
that one. Invariant: equal bytes have equal checksums, however they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

BLOCK_BYTES = 1 << 20
CHECKSUM_CHARACTERS = 32
"""128 bits in hex."""
_STEP_BYTES = 256 << 10
"""What is hashed at once: it stays in a core's own cache while the hash's tree is climbed."""


def block_digest(block: memoryview) -> bytes:
    """The digest of at most BLOCK_BYTES, contiguous. Other Python threads run meanwhile."""
    hasher = blake3()
    for start in range(0, len(block), _STEP_BYTES):
        hasher.update(block[start : start + _STEP_BYTES])
    return hasher.digest()


def checksum_of_blocks(digests: Iterable[bytes]) -> str:
    """The checksum of a tensor whose blocks have these digests, in order."""
    return blake3(b"".join(digests)).hexdigest()[:CHECKSUM_CHARACTERS]


def checksum_of(data: bytes | bytearray | memoryview) -> str:
    """The checksum of a whole tensor's bytes."""
    hasher = TensorHasher()
    hasher.update(data)
    return hasher.checksum()


class TensorHasher:
    """The checksum of a tensor whose bytes come in order, in pieces of any size. For one thread."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._block = blake3()
        self._block_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes; they may change afterwards."""
        view = memoryview(data).cast("B")
        while view:
            part = view[: min(_STEP_BYTES, BLOCK_BYTES - self._block_bytes)]
            self._block.update(part)
            self._block_bytes += len(part)
            if self._block_bytes == BLOCK_BYTES:
                self._close_block()
            view = view[len(part) :]

    def checksum(self) -> str:
        """Of all that came; nothing may come afterwards."""
        if self._block_bytes:
            self._close_block()
        return checksum_of_blocks(self._digests)

    def _close_block(self) -> None:
        self._digests.append(self._block.digest())
        self._block, self._block_bytes = blake3(), 0
