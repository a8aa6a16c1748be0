"""Images that this worker can copy from: a received descriptor, mapped, present and described.

Owns the mapping of each attached image and its registration with the device. Both take long and so
are done ahead of need, on whatever background thread calls `attach`; a swap never waits for them.
Invariant: an image that exists is mapped whole and its manifest is consistent; the descriptor is
closed either way, since a mapping keeps the memory alive without one.
"""

from __future__ import annotations

import logging

from engine.unpackers import prepare_unpacking
from swap.device import REGISTER_BYTES_MAX, DeviceMemory
from swap.errors import CorruptWeights, DeviceError, DeviceMisuse
from swap.image import Manifest, read_manifest
from swap.pieces import place_pieces, read_placed
from swap.segment import Mapping, Segment

log = logging.getLogger(__name__)


class Image:
    """One attached image. `close` unmaps it; nothing may be copying from it then."""

    def __init__(self, device: DeviceMemory, manifest: Manifest, source: Mapping) -> None:
        self.manifest = manifest
        self.source = source
        self.pageable_bytes = 0
        """Of its memory, what the system did not let be pinned: copying from there is slow."""
        self.being_read = False
        """All of it is being checked, so that it must not be closed."""
        self._device = device
        self._registered: list[int] = []

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @classmethod
    def attach(
        cls, device: DeviceMemory, descriptor: int, digest: str, *, must_be_pinned: bool = False
    ) -> Image:
        """Take a received descriptor over, map it and register it. Slow: off the hot threads.

        Raises CorruptWeights when it holds no finished image, or another one than `digest`; and
        DeviceError when it cannot be pinned but must be, or is packed and the device cannot unpack.
        """
        with Segment.adopt(descriptor) as segment:
            manifest = read_manifest(segment.descriptor)
            if manifest.digest != digest:
                raise CorruptWeights(
                    f"the segment sent as image {digest[:12]} holds image {manifest.digest[:12]}",
                    digest=manifest.digest,
                )
            if manifest.packed:
                prepare_unpacking(device.kind)
            image = cls(device, manifest, segment.map())
        try:
            image._check_pieces()
            image._register()
        except DeviceError as error:
            if must_be_pinned or isinstance(error, DeviceMisuse):
                image.close()
                raise
            log.warning("image %s is copied from pageable memory: %s", digest[:12], error)
        except BaseException:
            image.close()
            raise
        return image

    def _check_pieces(self) -> None:
        """Find a damaged piece of a packed image now, rather than in a swap."""
        for piece in place_pieces(self.manifest):
            if piece.packed:
                read_placed(self.source, piece)

    def _register(self) -> None:
        end = self.source.address + self.source.size_bytes
        self.pageable_bytes = self.source.size_bytes
        for address in range(self.source.address, end, REGISTER_BYTES_MAX):
            self._device.register(address, min(REGISTER_BYTES_MAX, end - address))
            self._registered.append(address)
            self.pageable_bytes = end - min(address + REGISTER_BYTES_MAX, end)

    def close(self) -> None:
        """Unregister and unmap. Idempotent."""
        while self._registered:
            self._device.unregister(self._registered.pop())
        self.source.close()
