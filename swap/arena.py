"""Who has which pages of a partition, and regions of stable addresses filled from them.

It owns the account: every page is free or belongs to one named owner. It never decides who deserves
pages, and it never touches their contents. Weights and KV of every engine are regions over the same
pool, so that a page passes whole from one to the other. Invariant: free pages plus owned pages are
all pages, after every call and every failure.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from swap.device import DeviceMemory
from swap.errors import DeviceMisuse, InsufficientDeviceMemory


class PagePool:
    """The pages of one device. Thread-safe; pages are numbers, as the device counts them.

    Free pages are kept as runs and handed out from the smallest run that is long enough, since
    runs of consecutive pages are what a device maps quickly.
    """

    def __init__(self, device: DeviceMemory) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._runs: list[tuple[int, int]] = [(0, device.pages_total)]  # (start, end), sorted
        self._owner: list[str | None] = [None] * device.pages_total
        self._owned: dict[str, int] = {}
        self._free = device.pages_total

    @property
    def page_bytes(self) -> int:
        return self.device.page_bytes

    @property
    def total_pages(self) -> int:
        return self.device.pages_total

    @property
    def free_pages(self) -> int:
        return self._free

    def owned_pages(self, owner: str) -> int:
        return self._owned.get(owner, 0)

    def owners(self) -> dict[str, int]:
        """Pages of every owner that has any."""
        with self._lock:
            return dict(self._owned)

    def pages_for(self, size_bytes: int) -> int:
        """Pages that hold `size_bytes`."""
        return -(-size_bytes // self.page_bytes)

    def take(self, owner: str, count: int) -> tuple[int, ...]:
        """Give `owner` `count` pages, all or none. Raises InsufficientDeviceMemory."""
        if count < 0:
            raise DeviceMisuse(f"{owner} asked for {count} pages")
        with self._lock:
            if count > self._free:
                raise self._insufficient(owner, count)
            pages: list[int] = []
            while len(pages) < count:
                pages += self._take_run(count - len(pages))
            pages.sort()
            for page in pages:
                self._owner[page] = owner
            if count:
                self._owned[owner] = self._owned.get(owner, 0) + count
            self._free -= count
        return tuple(pages)

    def give_back(self, owner: str, pages: Sequence[int]) -> None:
        """Take pages back from `owner`; refused whole if one of them is not theirs."""
        with self._lock:
            if len(set(pages)) != len(pages):
                raise DeviceMisuse(f"{owner} gave a page back twice")
            for page in pages:
                if not 0 <= page < len(self._owner) or self._owner[page] != owner:
                    raise DeviceMisuse(f"page {page} does not belong to {owner}")
            for page in pages:
                self._owner[page] = None
            left = self._owned.get(owner, 0) - len(pages)
            if left:
                self._owned[owner] = left
            else:
                self._owned.pop(owner, None)
            self._free += len(pages)
            self._runs = _merged(self._runs, sorted(pages))

    def _take_run(self, count: int) -> range:
        """Take at most `count` consecutive pages off the best run: the tightest, else longest."""
        enough = [run for run in self._runs if run[1] - run[0] >= count]
        if enough:
            start, end = min(enough, key=lambda run: (run[1] - run[0], run[0]))
        else:
            start, end = max(self._runs, key=lambda run: (run[1] - run[0], -run[0]))
        index = self._runs.index((start, end))
        taken = range(start, min(end, start + count))
        if taken.stop == end:
            del self._runs[index]
        else:
            self._runs[index] = (taken.stop, end)
        return taken

    def _insufficient(self, owner: str, count: int) -> InsufficientDeviceMemory:
        needed, free = count * self.page_bytes, self._free * self.page_bytes
        total = self.total_pages * self.page_bytes
        return InsufficientDeviceMemory(
            f"{owner} needs {needed} bytes of device memory, and {free} of {total} are free: "
            f"free {needed - free} bytes more, or give the partition more memory",
            needed_bytes=needed,
            free_bytes=free,
            total_bytes=total,
        )


class Region:
    """A range of device addresses that never changes, backed by as many pages as it needs now.

    `bytes_max` is rounded up to pages. Pages are mapped from the start on, without gaps. Not
    thread-safe: one engine, one owner.
    """

    def __init__(self, pool: PagePool, owner: str, bytes_max: int) -> None:
        self.pool = pool
        self.owner = owner
        self.pages_max = pool.pages_for(bytes_max)
        self.address = pool.device.reserve(bytes_max)
        self._pages: list[int] = []
        self._released = False

    @property
    def mapped_pages(self) -> int:
        return len(self._pages)

    @property
    def mapped_bytes(self) -> int:
        return len(self._pages) * self.pool.page_bytes

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages mapped now, in address order."""
        return tuple(self._pages)

    def grow(self, count: int) -> None:
        """Map `count` more pages at the end. Raises InsufficientDeviceMemory, changing nothing."""
        if count < 0 or self._released or self.mapped_pages + count > self.pages_max:
            raise DeviceMisuse(
                f"region {self.owner} cannot grow by {count} pages: it has {self.mapped_pages} "
                f"of at most {self.pages_max}"
            )
        if count == 0:
            return
        pages = self.pool.take(self.owner, count)
        try:
            self.pool.device.map(self.address + self.mapped_bytes, pages)
        except BaseException:
            self.pool.give_back(self.owner, pages)
            raise
        self._pages += pages

    def shrink(self, count: int) -> None:
        """Unmap the last `count` pages and give them back; their contents are lost."""
        if not 0 <= count <= self.mapped_pages:
            raise DeviceMisuse(
                f"region {self.owner} cannot shrink by {count} of {self.mapped_pages} pages"
            )
        if count == 0:
            return
        start = self.address + self.mapped_bytes - count * self.pool.page_bytes
        pages = self.pool.device.unmap(start, count)
        del self._pages[-count:]
        self.pool.give_back(self.owner, pages)

    def release(self) -> None:
        """Give pages and addresses back. Idempotent."""
        if self._released:
            return
        self.shrink(self.mapped_pages)
        self.pool.device.release(self.address)
        self._released = True


def _merged(runs: list[tuple[int, int]], pages: list[int]) -> list[tuple[int, int]]:
    """Sorted free runs with sorted free `pages` added, neighbours joined."""
    result: list[tuple[int, int]] = []
    for start, end in sorted([*runs, *((page, page + 1) for page in pages)]):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result
