"""The pages that an engine's KV lives in: a range of stable addresses that grows and shrinks.

Owns the Protocol that the block pool grows and shrinks through, its version over an arena's region
and one over plain memory. It never knows what a page holds. Invariant: pages are mapped from the
start on without gaps, and an address keeps its meaning for the life of the space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from swap.errors import InsufficientDeviceMemory

if TYPE_CHECKING:
    import torch

    from swap.arena import Region


class KvSpace(Protocol):
    """Pages of KV memory."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""

    @property
    def pages_max(self) -> int:
        """Pages for which there are addresses."""

    @property
    def pages(self) -> int:
        """Pages mapped now: the first ones."""

    @property
    def free_pages(self) -> int:
        """Pages that `grow` has without anybody giving them up."""

    def grow(self, count: int) -> int:
        """Map up to `count` more pages at the end; return how many there were to be had."""

    def shrink(self, count: int) -> None:
        """Give the last `count` pages back; their contents are lost."""

    def memory(self) -> torch.Tensor:
        """The whole range as uint8, unmapped pages included: those must not be touched."""


class RegionKvSpace:
    """KV pages over an arena's region.

    The region must outlive every tensor made from `memory`.
    """

    def __init__(self, region: Region) -> None:
        self._region = region

    @property
    def page_bytes(self) -> int:
        return self._region.pool.page_bytes

    @property
    def pages_max(self) -> int:
        return self._region.pages_max

    @property
    def pages(self) -> int:
        return self._region.mapped_pages

    @property
    def free_pages(self) -> int:
        return min(self._region.pool.free_pages, self.pages_max - self.pages)

    def grow(self, count: int) -> int:
        """Others take from the same pool meanwhile, so less than what looks free may be left."""
        wanted = min(count, self.pages_max - self.pages)
        while wanted > 0:
            try:
                self._region.grow(wanted)
            except InsufficientDeviceMemory:
                wanted = min(wanted - 1, self._region.pool.free_pages)
                continue
            return wanted
        return 0

    def shrink(self, count: int) -> None:
        self._region.shrink(count)

    def memory(self) -> torch.Tensor:
        from engine.device_tensors import bytes_at

        kind = self._region.pool.device.kind
        return bytes_at(kind, self._region.address, self.pages_max * self.page_bytes)


class PlainKvSpace:
    """KV pages over one ordinary allocation: for tests and benchmarks without an arena.

    `pages_available` may be changed at any time, as if others took and gave back pages.
    """

    def __init__(self, page_bytes: int, pages_max: int) -> None:
        self.page_bytes = page_bytes
        self.pages_max = pages_max
        self.pages_available = pages_max
        self.pages = 0
        self._memory: torch.Tensor | None = None

    @property
    def free_pages(self) -> int:
        return max(0, min(self.pages_max, self.pages_available) - self.pages)

    def grow(self, count: int) -> int:
        grown = max(0, min(count, self.free_pages))
        self.pages += grown
        return grown

    def shrink(self, count: int) -> None:
        if not 0 <= count <= self.pages:
            raise ValueError(f"cannot give back {count} of {self.pages} pages")
        self.pages -= count

    def memory(self) -> torch.Tensor:
        if self._memory is None:
            import torch

            self._memory = torch.empty(self.pages_max * self.page_bytes, dtype=torch.uint8)
        return self._memory
