"""Who has which pages of a partition, and regions of stable addresses filled from them.

It owns the account: every page is free or belongs to one named owner. It never decides who deserves
pages, and it never touches their contents. Weights and KV of every engine are regions over the same
pool, so that a page passes whole from one to the other. Invariant: free pages plus owned pages are
all pages, after every call and every failure.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from swap.device import DeviceMemory
from swap.errors import DeviceMisuse, InsufficientDeviceMemory, SwapError


class PagePool:
    """The pages of one device. Thread-safe; pages are numbers, as the device counts them.

    Free pages are kept as runs and handed out from the smallest run that is long enough, since
    runs of consecutive pages are what a device maps quickly. Where a device keeps mappings, whoever
    had a page at an address gets that page there again if it is free, which no run can better.
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

    def take(
        self, owner: str, count: int, wanted: Sequence[int] = (), *, from_end: bool = False
    ) -> tuple[int, ...]:
        """Give `owner` `count` pages, all or none. Raises InsufficientDeviceMemory.

        The first ones are those `wanted`, each in its place where it is free, if the device keeps
        mappings; the others are `from_end` those with the highest numbers.
        """
        if count < 0:
            raise DeviceMisuse(f"{owner} asked for {count} pages")
        with self._lock:
            if count > self._free:
                raise self._insufficient(owner, count)
            chosen: dict[int, int] = {}
            """Place of each page that was wanted and is free."""
            if self.device.keeps_mappings:
                for place, page in enumerate(wanted[:count]):
                    if self._owner[page] is None:
                        chosen.setdefault(page, place)
                self._runs = _without(self._runs, sorted(chosen))
            else:
                from_end = False
            rest: list[int] = []
            while len(rest) < count - len(chosen):
                rest += self._take_run(count - len(chosen) - len(rest), from_end)
            others, at = iter(sorted(rest)), {place: page for page, place in chosen.items()}
            pages = [at[place] if place in at else next(others) for place in range(count)]
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

    def _take_run(self, count: int, from_end: bool) -> range:
        """Take at most `count` consecutive pages off the best run: the tightest, else longest; or
        `from_end` the last ones of the last run."""
        if from_end:
            start, end = self._runs.pop()
            taken = range(max(start, end - count), end)
            if taken.start > start:
                self._runs.append((start, taken.start))
            return taken
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


class Growth:
    """Pages on their way to the end of a region: taken already, to be mapped by any thread."""

    def __init__(self, region: Region, pages: tuple[int, ...]) -> None:
        self.pages = pages
        self.ended = False
        """Whether the pages are mapped, or were given back because they could not be."""
        self._region = region
        self._lock = threading.Lock()

    def run(self) -> None:
        """Map the pages, or wait until another thread has; once they are, nothing more.

        Raises what the device does, and has given the pages back then.
        """
        with self._lock:
            if self.ended:
                return
            region = self._region
            try:
                region.pool.device.map(region.address + region.mapped_bytes, self.pages)
            except BaseException:
                region.pool.give_back(region.owner, self.pages)
                raise
            else:
                region.add(self.pages)
            finally:
                self.ended = True


class Region:
    """A range of device addresses that never changes, backed by as many pages as it needs now.

    `bytes_max` is rounded up to pages. Pages are mapped from the start on, without gaps. `from_end`
    regions, whose size comes and goes, take pages from the other end of the pool than those that
    take the same ones time and again: so they are seldom in each other's way.

    Not thread-safe: one engine, one owner; but another thread may run what `begin_grow` returned,
    and every change waits for that.
    """

    def __init__(
        self, pool: PagePool, owner: str, bytes_max: int, *, from_end: bool = False
    ) -> None:
        self.pool = pool
        self.owner = owner
        self.pages_max = pool.pages_for(bytes_max)
        self.address = pool.device.reserve(bytes_max)
        self._from_end = from_end
        self._pages: list[int] = []
        self._former: list[int] = []
        """The page that each place had last, those that are mapped now included."""
        self._growth: Growth | None = None
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

    @property
    def growing_pages(self) -> int:
        """Pages that were taken and are not mapped yet."""
        growth = self._growth
        return 0 if growth is None or growth.ended else len(growth.pages)

    def grow(self, count: int) -> None:
        """Map `count` more pages at the end. Raises InsufficientDeviceMemory, changing nothing."""
        self.begin_grow(count)
        self.settle()

    def begin_grow(self, count: int) -> Growth:
        """Take `count` pages now that are mapped by whoever runs what is returned.

        One at a time: an earlier one is settled first. Raises InsufficientDeviceMemory, changing
        nothing.
        """
        self.settle()
        if count < 0 or self._released or self.mapped_pages + count > self.pages_max:
            raise DeviceMisuse(
                f"region {self.owner} cannot grow by {count} pages: it has {self.mapped_pages} "
                f"of at most {self.pages_max}"
            )
        former = self._former[self.mapped_pages :]
        pages = self.pool.take(self.owner, count, former, from_end=self._from_end) if count else ()
        self._growth = Growth(self, pages)
        self._growth.ended = not count
        return self._growth

    def settle(self) -> None:
        """Map what was begun, unless another thread has; raises what the device does."""
        growth, self._growth = self._growth, None
        if growth is not None:
            growth.run()

    def add(self, pages: Sequence[int]) -> None:
        """For a growth: its pages are mapped."""
        self._former[self.mapped_pages : self.mapped_pages + len(pages)] = pages
        self._pages += pages

    def shrink(self, count: int) -> None:
        """Unmap the last `count` pages and give them back; their contents are lost."""
        with contextlib.suppress(SwapError):  # then there are fewer, which is what is asked for
            self.settle()
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
        with contextlib.suppress(SwapError):
            self.settle()
        self.shrink(self.mapped_pages)
        self.pool.device.release(self.address)
        self._released = True


def _without(runs: list[tuple[int, int]], pages: list[int]) -> list[tuple[int, int]]:
    """Sorted free runs less sorted `pages`, which all lie in them."""
    result: list[tuple[int, int]] = []
    left = iter([*pages, None])
    page = next(left)
    for start, end in runs:
        while page is not None and page < end:
            if start < page:
                result.append((start, page))
            start, page = page + 1, next(left)
        if start < end:
            result.append((start, end))
    return result


def _merged(runs: list[tuple[int, int]], pages: list[int]) -> list[tuple[int, int]]:
    """Sorted free runs with sorted free `pages` added, neighbours joined."""
    result: list[tuple[int, int]] = []
    for start, end in sorted([*runs, *((page, page + 1) for page in pages)]):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result
