"""The KV blocks of one engine: which are free, which are held, and how many pages back them.

Owns the account of blocks and the growing and shrinking of the KV space. It never knows who holds a
block or what is in it, and never imports torch. Invariant: every block of a mapped page is either
free or held, once; no page is given back while one of its blocks is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from engine.kv_space import KvSpace

PAGES_GROW = 8
"""Pages mapped at once, ahead of need: mapping costs about the same for one as for several."""


class BlockPool:
    """Blocks over the pages of a KV space. Not thread-safe: of the step loop alone.

    The lowest free blocks are handed out first, so that the last pages fall free and can be given
    back. Blocks that cached prefixes keep will be counted free and taken back when these run out.
    """

    def __init__(self, space: KvSpace, blocks_per_page: int) -> None:
        self._space = space
        self._blocks_per_page = blocks_per_page
        self._free: list[int] = []
        self._held = bytearray(space.pages_max * blocks_per_page)
        self._used = 0

    @property
    def capacity(self) -> int:
        """Blocks there are addresses for."""
        return self._space.pages_max * self._blocks_per_page

    @property
    def used(self) -> int:
        """Blocks held."""
        return self._used

    @property
    def pages(self) -> int:
        """Pages mapped now."""
        return self._space.pages

    def provide(self, count: int) -> bool:
        """Map pages until `count` blocks are free; False when there are not as many to be had."""
        missing = count - len(self._free)
        if missing <= 0:
            return True
        pages = -(-missing // self._blocks_per_page)
        before = self._space.pages
        grown = self._space.grow(max(pages, PAGES_GROW))
        first = before * self._blocks_per_page
        for block in range(first, first + grown * self._blocks_per_page):
            heapq.heappush(self._free, block)
        return grown >= pages

    def take(self, count: int) -> list[int] | None:
        """Hold `count` blocks, all or none: None when there are not as many to be had."""
        if not self.provide(count):
            return None
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._held[block] = 1
        self._used += count
        return blocks

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks that were taken. Giving one back twice is a bug and raises ValueError."""
        for block in blocks:
            if not self._held[block]:
                raise ValueError(f"block {block} is not held")
            self._held[block] = 0
            self._used -= 1
            heapq.heappush(self._free, block)

    def trim(self) -> int:
        """Give back the last pages that hold nothing; return how many."""
        keep = self._space.pages
        while keep > 0 and not self._page_is_held(keep - 1):
            keep -= 1
        count = self._space.pages - keep
        if count:
            end = keep * self._blocks_per_page
            self._free = [block for block in self._free if block < end]
            heapq.heapify(self._free)
            self._space.shrink(count)
        return count

    def check(self) -> None:
        """Compare the account with itself; for tests and idle moments. Raises AssertionError."""
        mapped = self._space.pages * self._blocks_per_page
        held = [block for block in range(len(self._held)) if self._held[block]]
        assert len(held) == self._used, "the number of held blocks is wrong"
        assert sorted([*held, *self._free]) == list(range(mapped)), "a block is lost or doubled"

    def _page_is_held(self, page: int) -> bool:
        start = page * self._blocks_per_page
        return any(self._held[start : start + self._blocks_per_page])
