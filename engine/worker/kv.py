"""The KV pages of a resident: as many as its requests need, and never fewer than promised.

Owns the floor under an engine's KV, and the pages mapped beyond what it uses. It never knows what a
page holds. Mapping takes the driver's time, so a step should find pages mapped: while the engine
serves, what its requests gave back stays mapped, and further pages are mapped in the background
before the last ones are in use. Such pages count as free: whoever needs them takes them. Invariant:
the region has as many pages mapped as the engine uses, or the floor, whichever is more; and no
others, unless the engine serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from engine.device_tensors import bytes_at
from engine.worker.mapper import Mapper
from swap.arena import Region
from swap.errors import InsufficientDeviceMemory, SwapError

SLACK_PAGES = 8
"""Mapped beyond what is in use: what a burst finds ready. The block pool grows by as many."""


class FlooredKvSpace:
    """A KV space (see `engine.kv_space.KvSpace`) over a region, with pages set aside.

    `reclaim(pages)` is called when free pages do not suffice; it frees as many as it can. `mapper`
    maps pages ahead of need; without one each is mapped when it is needed.
    """

    def __init__(
        self,
        region: Region,
        reclaim: Callable[[int], None] | None = None,
        mapper: Mapper | None = None,
    ) -> None:
        self.pages = 0
        """Pages the engine uses: the first ones."""
        self.growing = False
        """Whether others are just being asked for pages, so that its own must stay."""
        self._region = region
        self._floor = 0
        self._reclaim = reclaim
        self._mapper = mapper
        self._serving = False

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

    @property
    def free_pages(self) -> int:
        """Pages that `grow` has without anybody giving them up."""
        return min(self.pages_max, self.mapped + self._region.pool.free_pages) - self.pages

    def needed(self, held: int) -> int:
        """Pages that were promised, or are of the first `held`, which requests need;
        what is mapped beyond them counts as free."""
        return max(held, min(self._floor, self.mapped))

    def unused(self, held: int) -> int:
        """Pages beyond those: they are as good as free, though prefixes may be cached in them."""
        # Of the pool's account, which has pages on their way too.
        taken = self._region.pool.owned_pages(self._region.owner)
        return taken - max(held, min(self._floor, taken))

    def serve(self, serving: bool) -> None:
        """The engine serves from now on, or no more: then what is unused is given back."""
        self._serving = serving
        if serving:
            self.map_ahead()
        else:
            self.release_unused()

    def release_unused(self) -> None:
        """Give back what nobody uses."""
        self._settle()
        self._region.shrink(max(0, self.mapped - max(self.pages, self._floor)))

    def set_floor(self, pages: int) -> None:
        """Have this many pages at least. Raises InsufficientDeviceMemory, changing nothing."""
        self._settle()
        self._region.grow(max(0, pages - self.mapped))
        self._floor = pages
        self.release_unused()

    def grow(self, count: int) -> int:
        """Use up to `count` more pages; fewer when others have taken them meanwhile, or when the
        device has not the memory that it promised."""
        wanted = min(self.pages + count, self.pages_max)
        if wanted > self.mapped:
            self._settle()
        short = wanted - self.mapped - self._region.pool.free_pages
        if short > 0 and self._reclaim is not None:
            self.growing = True
            try:
                self._reclaim(short)
            finally:
                self.growing = False
        while wanted > self.mapped:
            wanted = min(wanted, self.mapped + self._region.pool.free_pages)
            try:
                self._region.grow(max(0, wanted - self.mapped))
            except InsufficientDeviceMemory:
                # Others were quicker, or the device has no memory left. Fewer may be had; to try
                # for as many again might never end.
                wanted = self.mapped + (wanted - self.mapped) // 2
        grown = max(0, wanted - self.pages)
        self.pages += grown
        self.map_ahead()
        return grown

    def shrink(self, count: int) -> None:
        """Use `count` pages less, from the end; their contents are lost.

        While the engine serves they stay mapped, since its next request will want them.
        """
        if not 0 <= count <= self.pages:
            raise ValueError(f"cannot give back {count} of {self.pages} pages")
        self.pages -= count
        if not self._serving:
            self.release_unused()

    def memory(self) -> torch.Tensor:
        """The whole range as uint8, unmapped pages included: those must not be touched."""
        size_bytes = self.pages_max * self.page_bytes
        return bytes_at(self._region.pool.device.kind, self._region.address, size_bytes)

    def map_ahead(self) -> None:
        """Have pages mapped in the background, when few are left that are mapped and not in use."""
        if not self._serving or self._mapper is None or self._mapper.paused:
            return
        if self._region.growing_pages:
            return
        spare = self.mapped - self.pages
        room = min(self.pages_max - self.mapped, self._region.pool.free_pages)
        if room > 0 and spare < SLACK_PAGES:
            with contextlib.suppress(SwapError):  # others were quicker: then there is no slack
                self._mapper.submit(self._region.begin_grow(min(SLACK_PAGES - spare, room)))

    def _settle(self) -> None:
        """Have what is being mapped ahead; if that fails, it is tried again by who needs it."""
        with contextlib.suppress(SwapError):
            self._region.settle()
