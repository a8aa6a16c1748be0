"""The KV pages of a resident: as many as its requests need now, and never fewer than promised.

Owns the floor under an engine's KV. It never knows what a page holds. An engine that falls idle
gives its pages back; those below the floor stay mapped all the same, so that one longest request
can always run, and that a request after a pause does not wait for the page tables. Invariant: the
region has as many pages mapped as the engine uses, or the floor, whichever is more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.device_tensors import bytes_at
from swap.arena import Region
from swap.errors import InsufficientDeviceMemory


class FlooredKvSpace:
    """A KV space (see `engine.kv_space.KvSpace`) over a region, with pages set aside.

    `reclaim(pages)` is called when free pages do not suffice; it frees as many as it can.
    """

    def __init__(self, region: Region, reclaim: Callable[[int], None] | None = None) -> None:
        self.pages = 0
        """Pages the engine uses: the first ones."""
        self._region = region
        self._floor = 0
        self._reclaim = reclaim

    @property
    def page_bytes(self) -> int:
        return self._region.pool.page_bytes

    @property
    def pages_max(self) -> int:
        return self._region.pages_max

    @property
    def mapped(self) -> int:
        """Pages mapped now, those set aside included."""
        return self._region.mapped_pages

    @property
    def beyond_floor(self) -> int:
        """Pages mapped now that were not promised."""
        return self.mapped - min(self._floor, self.mapped)

    def set_floor(self, pages: int) -> None:
        """Have this many pages at least. Raises InsufficientDeviceMemory, changing nothing."""
        self._region.grow(max(0, pages - self.mapped))
        self._floor = pages
        self._give_back()

    def grow(self, count: int) -> int:
        """Use up to `count` more pages; fewer when others have taken them meanwhile."""
        wanted = min(self.pages + count, self.pages_max)
        short = wanted - self.mapped - self._region.pool.free_pages
        if short > 0 and self._reclaim is not None:
            self._reclaim(short)
        while wanted > self.mapped:
            free = self._region.pool.free_pages
            wanted = min(wanted, self.mapped + free)
            try:
                self._region.grow(max(0, wanted - self.mapped))
            except InsufficientDeviceMemory:
                continue  # taken between the look and the grasp; look again
        grown = max(0, wanted - self.pages)
        self.pages += grown
        return grown

    def shrink(self, count: int) -> None:
        """Use `count` pages less, from the end; their contents are lost."""
        if not 0 <= count <= self.pages:
            raise ValueError(f"cannot give back {count} of {self.pages} pages")
        self.pages -= count
        self._give_back()

    def memory(self) -> torch.Tensor:
        """The whole range as uint8, unmapped pages included: those must not be touched."""
        size_bytes = self.pages_max * self.page_bytes
        return bytes_at(self._region.pool.device.kind, self._region.address, size_bytes)

    def _give_back(self) -> None:
        self._region.shrink(max(0, self.mapped - max(self.pages, self._floor)))
