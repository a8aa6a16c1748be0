"""Which handle the driver has mapped at which address, and the calls that change it.

It owns the driver's mappings, which may outlive a page's being there: a page that is given back
stays mapped where it was until its address is wanted for another page, so that a model which comes
back to the pages it had costs no call. A handle may then be mapped at several addresses; which of
them may be used is the page table's account, and this module never asks it. Invariant: a call that
fails leaves no mapping that was not there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from swap.cuda_driver import (
    DEFAULT_STREAM,
    INVALID_VALUE,
    NOT_SUPPORTED,
    Driver,
    DriverError,
)


class CudaMappings:
    """Mappings of handles of `page_bytes`, one a page. Not thread-safe: the device has the lock.

    With `kept` mappings stay until their address is wanted; else they go with the page.
    """

    def __init__(self, driver: Driver, gpu: int, page_bytes: int, *, kept: bool) -> None:
        self.kept = kept
        self.runs_changed = 0
        """Stretches of addresses that were mapped or unmapped."""
        self._driver = driver
        self._gpu = gpu
        self._page_bytes = page_bytes
        self._handle_at: dict[int, int] = {}
        self._unmaps_ranges = True
        """Whether the driver unmaps several handles with one call; until it has refused to."""

    def __len__(self) -> int:
        return len(self._handle_at)

    def map(self, address: int, handles: Sequence[int]) -> None:
        """Have handles side by side from `address` on; what is there already costs nothing.

        A stretch takes one call per handle and one for access, and one more where others were.
        """
        wanted = {address + i * self._page_bytes: handle for i, handle in enumerate(handles)}
        fresh = [place for place, handle in wanted.items() if self._handle_at.get(place) != handle]
        others = [place for place in fresh if place in self._handle_at]
        if others:
            # Nobody uses these addresses any more; but what unmaps waits, here as elsewhere.
            self._driver.stream_synchronize(DEFAULT_STREAM)
            self._unmap(others)
        mapped: list[int] = []
        try:
            for start, count in self._runs(fresh):
                end = start + count * self._page_bytes
                for place in range(start, end, self._page_bytes):
                    self._driver.mem_map(place, self._page_bytes, wanted[place])
                    mapped.append(place)
                    self._handle_at[place] = wanted[place]
                self._driver.mem_set_access(start, end - start, self._gpu)
                self.runs_changed += 1
        except BaseException:
            self._unmap(mapped)
            raise

    def unmap(self, address: int, count: int) -> None:
        """The pages from `address` on are not there any more; nothing uses them."""
        if not self.kept:
            self._unmap(range(address, address + count * self._page_bytes, self._page_bytes))

    def clear(self, address: int, size_bytes: int) -> None:
        """Unmap what is left in a reserved range, which must be free of use."""
        places = range(address, address + size_bytes, self._page_bytes)
        left = [place for place in places if place in self._handle_at]
        if left:
            self._driver.stream_synchronize(DEFAULT_STREAM)
            self._unmap(left)

    def _unmap(self, places: Iterable[int]) -> None:
        for start, count in self._runs(places):
            self._unmap_run(start, count)
            self.runs_changed += 1

    def _unmap_run(self, address: int, count: int) -> None:
        """Unmap handles side by side: with one call, or one by one where that is refused."""
        places = range(address, address + count * self._page_bytes, self._page_bytes)
        if count > 1 and self._unmaps_ranges:
            try:
                self._driver.mem_unmap(address, count * self._page_bytes)
            except DriverError as error:
                if error.code not in (INVALID_VALUE, NOT_SUPPORTED):
                    raise
            else:
                for place in places:
                    del self._handle_at[place]
                return
        for place in places:
            self._driver.mem_unmap(place, self._page_bytes)
            del self._handle_at[place]
        # What is allowed one by one was refused as a range, or would be.
        self._unmaps_ranges = self._unmaps_ranges and count <= 1

    def _runs(self, places: Iterable[int]) -> Iterator[tuple[int, int]]:
        """(address, pages) of each stretch of ascending addresses within one range."""
        begin = count = 0
        for place in places:
            if count and place == begin + count * self._page_bytes:
                count += 1
                continue
            if count:
                yield begin, count
            begin, count = place, 1
        if count:
            yield begin, count
