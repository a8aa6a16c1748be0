"""The KV blocks of one engine: which are free, which are held, and how many pages back them.

Owns the account of blocks and the growing and shrinking of the KV space. It never knows who holds a
block or what is in it, and never imports torch. A block may be held several times, by requests that
share it. One that nobody holds any more, but whose contents have a name, is idle: it can be held
again by that name, and counts as free. Idle blocks are forgotten before anybody gives up anything
else for blocks. Invariant: every block of a mapped page is either free, idle or held; no page is
given back while one of its blocks is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from engine.cached_blocks import CachedBlocks
from engine.kv_space import KvSpace

PAGES_GROW = 8
"""Pages mapped at once, ahead of need: mapping costs about the same for one as for several."""


class BlockPool:
    """Blocks over the pages of a KV space. Not thread-safe: of the step loop alone.

    The lowest free blocks are handed out first, so that the last pages fall free and can be given
    back.
    """

    def __init__(self, space: KvSpace, blocks_per_page: int) -> None:
        self._space = space
        self._blocks_per_page = blocks_per_page
        self._free: list[int] = []
        self._holds = [0] * (space.pages_max * blocks_per_page)
        self._page_holds = [0] * space.pages_max
        self._used = 0
        self._cached = CachedBlocks()

    @property
    def used(self) -> int:
        """Blocks held; one that is held several times counts once."""
        return self._used

    @property
    def idle(self) -> int:
        """Blocks that only keep their contents for whoever may ask for them."""
        return self._cached.idle

    @property
    def pages(self) -> int:
        """Pages mapped now."""
        return self._space.pages

    @property
    def pages_held(self) -> int:
        """Pages up to the last of which a block is held; those behind it can be given back."""
        pages = self._space.pages
        while pages > 0 and not self._page_holds[pages - 1]:
            pages -= 1
        return pages

    def holds(self, block: int) -> int:
        """How many times a block is held."""
        return self._holds[block]

    def provide(self, count: int) -> bool:
        """See to it that `count` blocks can be taken; False when there are not as many to be had.

        Pages that nobody has come first, then idle blocks, then pages that others must give up.
        """
        self._grow(count - len(self._free), self._space.free_pages)
        self._grow(count - len(self._free) - self._cached.idle, self._space.pages_max)
        return len(self._free) + self._cached.idle >= count

    def take(self, count: int) -> list[int] | None:
        """Hold `count` blocks, all or none: None when there are not as many to be had."""
        if not self.provide(count):
            return None
        while len(self._free) < count:
            heapq.heappush(self._free, self._cached.forget_oldest())
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._hold(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more that were found by name."""
        for block in blocks:
            if not self._cached.wake(block) and not self._holds[block]:
                raise ValueError(f"block {block} is neither held nor idle")
            self._hold(block)

    def give_back(self, blocks: Iterable[int]) -> None:
        """End one hold of each block. Doing so once too often is a bug and raises ValueError.

        Of those that become idle, the first given back is the first forgotten.
        """
        for block in blocks:
            if not self._holds[block]:
                raise ValueError(f"block {block} is not held")
            self._holds[block] -= 1
            if self._holds[block]:
                continue
            self._used -= 1
            self._page_holds[block // self._blocks_per_page] -= 1
            if block in self._cached:
                self._cached.rest(block)
            else:
                heapq.heappush(self._free, block)

    # Contents.

    def find(self, key: bytes) -> int | None:
        """The block whose contents have this name, to be held by `share`."""
        return self._cached.find(key)

    def name(self, key: bytes, block: int) -> None:
        """Let a held block be found by `key`, if no other is. Its contents must not change."""
        if not self._holds[block]:
            raise ValueError(f"block {block} is not held, so that it has no contents")
        self._cached.name(key, block)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let the blocks with these names not be found any more; those that are idle fall free."""
        for key in keys:
            block = self._cached.find(key)
            if block is not None:
                if self._cached.wake(block):
                    heapq.heappush(self._free, block)
                self._cached.forget(block)

    # Pages.

    def trim(self, pages: int | None = None) -> int:
        """Give back the last pages that nobody holds a block of, at most `pages` of them; what they
        have cached is forgotten. Returns how many."""
        count = self._space.pages - self.pages_held
        return self._shrink(count if pages is None else min(pages, count))

    def trim_empty(self) -> int:
        """Give back the last pages in which nothing is held and nothing cached."""
        cached = max(self._cached.idle_blocks(), default=-1) // self._blocks_per_page + 1
        return self._shrink(self._space.pages - max(self.pages_held, cached))

    def check(self) -> None:
        """Compare the account with itself; for tests and idle moments. Raises AssertionError."""
        mapped = self._space.pages * self._blocks_per_page
        held = [block for block, holds in enumerate(self._holds) if holds]
        idle = list(self._cached.idle_blocks())
        assert len(held) == self._used, "the number of held blocks is wrong"
        assert sum(self._page_holds) == self._used, "the number of held blocks in pages is wrong"
        every = sorted([*held, *idle, *self._free])
        assert every == list(range(mapped)), "a block is lost or doubled"
        assert all(block in self._cached for block in idle), "a block is kept without a name"

    def _grow(self, blocks: int, pages_max: int) -> None:
        if blocks > 0 and pages_max > 0:
            before = self._space.pages
            pages = -(-blocks // self._blocks_per_page)
            grown = self._space.grow(min(max(pages, PAGES_GROW), pages_max))
            first = before * self._blocks_per_page
            for block in range(first, first + grown * self._blocks_per_page):
                heapq.heappush(self._free, block)

    def _shrink(self, pages: int) -> int:
        if pages:
            end = (self._space.pages - pages) * self._blocks_per_page
            for block in [one for one in self._cached.idle_blocks() if one >= end]:
                self._cached.forget(block)
            self._free = [block for block in self._free if block < end]
            heapq.heapify(self._free)
            self._space.shrink(pages)
        return pages

    def _hold(self, block: int) -> None:
        if not self._holds[block]:
            self._used += 1
            self._page_holds[block // self._blocks_per_page] += 1
        self._holds[block] += 1
