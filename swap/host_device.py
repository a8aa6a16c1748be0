"""Ordinary host memory in the role of a device's: the same rules, enforced by the page tables.

It owns one anonymous pool of physical pages and the address ranges they are mapped into. A page
fault is by far the slowest thing that host memory does (seconds per GiB on virtual machines), so
each page is faulted in once in its life and from then on travels: mapping moves its page-table
entries from the pool's home range to the target, and unmapping moves them back, 2 MiB-aligned and
in runs as long as the page numbers allow. No byte is copied, and an access to a range without pages
faults. Invariant: every page is either at home or at exactly one target, and `_table` knows which.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from swap.device import Clock, DeviceStatistics, SystemClock
from swap.errors import DeviceMisuse
from swap.page_table import PageTable, rows_span
from swap.virtual_memory import GIGANTIC_BYTES, HUGE_PAGE_BYTES, VirtualMemory

_IN, _OUT = 0, 1


class HostDevice:
    """`memory_bytes` of host memory as a device (see `swap.device.DeviceMemory`).

    `page_bytes` is a multiple of 2 MiB. With `link_bytes_per_s` copies in are paced to that rate,
    as if they crossed a slower link. Raises DeviceError when the system refuses the address space.
    """

    kind: Literal["host", "cuda"] = "host"
    copies_ahead = 0
    keeps_mappings = False

    def __init__(
        self,
        memory_bytes: int,
        *,
        page_bytes: int = HUGE_PAGE_BYTES,
        link_bytes_per_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        if page_bytes <= 0 or page_bytes % HUGE_PAGE_BYTES:
            raise DeviceMisuse(f"a page of {page_bytes} bytes is no multiple of {HUGE_PAGE_BYTES}")
        if memory_bytes < page_bytes:
            raise DeviceMisuse(f"{memory_bytes} bytes hold no page of {page_bytes} bytes")
        if link_bytes_per_s is not None and not link_bytes_per_s > 0:
            raise DeviceMisuse(f"a link of {link_bytes_per_s} bytes/s moves nothing")
        self.page_bytes = page_bytes
        self.pages_total = memory_bytes // page_bytes
        self.link_bytes_per_s = link_bytes_per_s
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._memory = VirtualMemory()
        self._lock = threading.Lock()
        self._home_bytes = self.pages_total * page_bytes
        self._home = self._memory.reserve(self._home_bytes, self._alignment(self._home_bytes))
        self._memory.make_writable(self._home, self._home_bytes)
        self._table = PageTable(page_bytes, self.pages_total)
        self._present = bytearray(self.pages_total)
        self._copies: list[tuple[int, int]] = []  # running copies, as (start, end)
        self._map_calls = 0
        self._copied_bytes = 0
        self._link_free_at = [0.0, 0.0]
        self._closed = False

    # Addresses.

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses; a range of a GiB or more is aligned so that whole GiBs can move."""
        size_bytes = self._table.rounded(size_bytes)
        with self._lock:
            self._check_open()
            address = self._memory.reserve(size_bytes, self._alignment(size_bytes))
            self._table.reserve(address, size_bytes)
        return address

    def release(self, address: int) -> None:
        """Give a reserved range back. Refused while a page is mapped in it."""
        with self._lock:
            self._memory.release(address, self._table.check_release(address))
            self._table.release(address)

    # Pages.

    def prefault(self, pages: Sequence[int]) -> int:
        """Fault pages in, one at a time, so that a swap waits for one fault at most."""
        fresh = 0
        for page in pages:
            with self._lock:
                self._check_open()
                self._table.check_page(page)
                if self._present[page]:
                    continue
                place = self._table.place.get(page, self._home_of(page))
                self._memory.populate(place, self.page_bytes, write=True)
                self._present[page] = 1
                fresh += 1
        return fresh

    def map(self, address: int, pages: Sequence[int]) -> None:
        """Move pages from home to `address` and on, run by run."""
        with self._lock:
            self._check_open()
            self._table.check_map(address, pages)
            done: list[tuple[int, int, int]] = []
            try:
                for first, count, place in self._runs(address, pages):
                    self._move(self._home_of(first), place, count)
                    done.append((first, count, place))
            except BaseException:
                for first, count, place in done:
                    self._move(place, self._home_of(first), count)
                raise
            self._table.map(address, pages)

    def unmap(self, address: int, count: int) -> tuple[int, ...]:
        """Move pages back home, run by run; their former addresses are inaccessible again."""
        with self._lock:
            self._check_open()
            pages = self._table.check_unmap(address, count)
            end = address + count * self.page_bytes
            if any(start < end and address < stop for start, stop in self._copies):
                raise DeviceMisuse(f"a copy in the {count} pages from {address:#x} on is running")
            for first, run, place in self._runs(address, pages):
                self._move(place, self._home_of(first), run)
                self._table.unmap(range(first, first + run))
        return pages

    # Copies.

    def register(self, address: int, size_bytes: int, *, writable: bool = False) -> None:
        """Make a mapped source present in this process's page tables; it need not be pinned."""
        self._memory.populate(address, size_bytes, write=writable)

    def unregister(self, address: int) -> None:
        """Nothing to undo: the page tables go with the mapping."""

    def copy_in(self, destination: int, source: int, size_bytes: int) -> int:
        """Copy now, in this thread; other threads run meanwhile."""
        with self._copying(destination, size_bytes, size_bytes, _IN):
            self._memory.copy(destination, source, size_bytes)
        return 0

    def copy_out(self, destination: int, source: int, size_bytes: int) -> int:
        """Copy now, in this thread; other threads run meanwhile.

        Not paced: it reads samples back to verify them, and a swap's figures are of its weights.
        """
        with self._copying(source, size_bytes, size_bytes, None):
            self._memory.copy(destination, source, size_bytes)
        return 0

    def copy_in_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Spread rows now, in this thread; other threads run meanwhile."""
        span = rows_span(row_bytes, rows, pitch_bytes)
        with self._copying(destination, span, row_bytes * rows, _IN):
            self._memory.copy_rows(destination, pitch_bytes, source, row_bytes, row_bytes, rows)
        return 0

    def copy_out_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Gather rows now, in this thread; other threads run meanwhile."""
        span = rows_span(row_bytes, rows, pitch_bytes)
        with self._copying(source, span, row_bytes * rows, _OUT):
            self._memory.copy_rows(destination, row_bytes, source, pitch_bytes, row_bytes, rows)
        return 0

    @contextmanager
    def _copying(
        self, address: int, span_bytes: int, copied_bytes: int, direction: int | None
    ) -> Iterator[None]:
        """Keep a range of the device from being unmapped, and a direction of the link's pace."""
        copy = (address, address + span_bytes)
        with self._lock:
            self._check_open()
            self._table.check_copy(address, span_bytes)
            self._copies.append(copy)
            started = self._clock.monotonic()
        try:
            yield
            if self.link_bytes_per_s is not None and direction is not None:
                self._pace(started, copied_bytes / self.link_bytes_per_s, direction)
        finally:
            with self._lock:
                self._copies.remove(copy)
                self._copied_bytes += copied_bytes

    def _pace(self, started: float, seconds: float, direction: int) -> None:
        with self._lock:
            # Copies of one direction queue for the link, whichever thread issued them.
            free_at = self._link_free_at
            free_at[direction] = max(free_at[direction], started) + seconds
            wait = free_at[direction] - self._clock.monotonic()
        if wait > 0:
            self._clock.sleep(wait)

    def wait(self, copy: int) -> None:
        """Copies are complete when the calls that make them return."""

    def synchronize(self) -> None:
        """Copies are complete when the calls that make them return."""

    # Accounts.

    def statistics(self) -> DeviceStatistics:
        with self._lock:
            return DeviceStatistics(
                pages_total=self.pages_total,
                pages_present=sum(self._present),
                pages_mapped=len(self._table.place),
                reservations=len(self._table.reserved),
                map_calls=self._map_calls,
                copied_bytes=self._copied_bytes,
            )

    def close(self) -> None:
        """Free the pool and every range. Refused while a copy runs; idempotent."""
        with self._lock:
            if self._closed:
                return
            if self._copies:
                raise DeviceMisuse("a copy is running: join its transfer before closing the device")
            self._closed = True
            for address, size_bytes in self._table.reserved.items():
                self._memory.release(address, size_bytes)
            self._memory.release(self._home, self._home_bytes)
            self._table.clear()

    # Inside, with the lock held.

    def _move(self, source: int, destination: int, count: int) -> None:
        self._memory.move(source, destination, count * self.page_bytes)
        self._map_calls += 1

    def _runs(self, address: int, pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(first page, count, address) of each run that is consecutive at home and at target."""
        begin = 0
        for index in range(1, len(pages) + 1):
            if index == len(pages) or pages[index] != pages[index - 1] + 1:
                yield pages[begin], index - begin, address + begin * self.page_bytes
                begin = index

    def _home_of(self, page: int) -> int:
        return self._home + page * self.page_bytes

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceMisuse("the device is closed")

    @staticmethod
    def _alignment(size_bytes: int) -> int:
        return GIGANTIC_BYTES if size_bytes >= GIGANTIC_BYTES else HUGE_PAGE_BYTES
