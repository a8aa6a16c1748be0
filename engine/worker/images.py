"""Images that this worker can copy from: a received descriptor, mapped, present and described.

Owns the mapping of each attached image and its registration with the device. Both take long and so
are done ahead of need, on whatever background thread calls `attach`; a swap never waits for them.
Invariant: an image that exists is mapped whole and its manifest is consistent; the descriptor is
closed either way, since a mapping keeps the memory alive without one.
"""

from __future__ import annotations

from swap.device import REGISTER_BYTES_MAX, DeviceMemory
from swap.errors import CorruptWeights
from swap.image import Manifest, read_manifest
from swap.segment import Mapping, Segment


class Image:
    """One attached image. `close` unmaps it; nothing may be copying from it then."""

    def __init__(self, device: DeviceMemory, manifest: Manifest, source: Mapping) -> None:
        self.manifest = manifest
        self.source = source
        self._device = device
        self._registered: list[int] = []

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @classmethod
    def attach(cls, device: DeviceMemory, descriptor: int, digest: str) -> Image:
        """Take a received descriptor over, map it and register it. Slow: off the hot threads.

        Raises CorruptWeights when it holds no finished image, or another one than `digest`.
        """
        with Segment.adopt(descriptor) as segment:
            manifest = read_manifest(segment.descriptor)
            if manifest.digest != digest:
                raise CorruptWeights(
                    f"the segment sent as image {digest[:12]} holds image {manifest.digest[:12]}",
                    digest=manifest.digest,
                )
            image = cls(device, manifest, segment.map())
        try:
            image._register()
        except BaseException:
            image.close()
            raise
        return image

    def _register(self) -> None:
        end = self.source.address + self.source.size_bytes
        for address in range(self.source.address, end, REGISTER_BYTES_MAX):
            self._device.register(address, min(REGISTER_BYTES_MAX, end - address))
            self._registered.append(address)

    def close(self) -> None:
        """Unregister and unmap. Idempotent."""
        while self._registered:
            self._device.unregister(self._registered.pop())
        self.source.close()
