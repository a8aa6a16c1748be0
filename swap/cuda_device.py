"""A partition's memory on a CUDA GPU: addresses that stay, and one pool of physical handles.

It owns the partition's handles, one a page, the reserved ranges, two streams for copies and the
events that tell of their ends. A handle is created once, in the background or when it is first
mapped, and kept until `close`: creating and releasing is by far the slowest thing the driver does
here. How much there is follows from `memory_bytes`, never from what happens to be free. It never
computes, and it never changes what a caller's thread computes on: the default stream. Invariants:
no page is unmapped under a copy or a kernel; every call runs with the GPU's primary context
current, which torch uses too; what a failed call had done is undone.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from swap.cuda_driver import DEFAULT_STREAM, OUT_OF_MEMORY, CudaDriver, Driver, DriverError
from swap.device import REGISTER_BYTES_MAX, DeviceStatistics
from swap.errors import DeviceError, DeviceMisuse, InsufficientDeviceMemory
from swap.page_table import PageTable, rows_span

PAGE_BYTES = 64 << 20
COPIES_AHEAD = 2
"""With one copy of 64 MiB running (1.2 ms at 55 GB/s) and two behind it, a thread that is woken
within some 2 ms keeps the link busy, and a swap that is given up soon ends."""


@dataclass(frozen=True)
class _Copy:
    """A copy that was issued: its event, and the addresses it touches, as (start, end)."""

    event: int
    device: tuple[int, int]
    host: tuple[int, int]
    thread: int


class CudaDevice:
    """`memory_bytes` of the GPU's memory in pages (see `swap.device.DeviceMemory`).

    `page_bytes` is rounded up to what the driver can map. Raises DeviceError where there is no
    driver or no such GPU. The first visible GPU is used: choose with CUDA_VISIBLE_DEVICES.
    """

    kind: Literal["host", "cuda"] = "cuda"
    copies_ahead = COPIES_AHEAD

    def __init__(
        self,
        memory_bytes: int,
        *,
        page_bytes: int = PAGE_BYTES,
        driver: Driver | None = None,
        ordinal: int = 0,
    ) -> None:
        if page_bytes <= 0:
            raise DeviceMisuse(f"a page of {page_bytes} bytes holds nothing")
        self._driver: Driver = driver if driver is not None else CudaDriver()
        self._driver.init()
        self._gpu = self._driver.device_get(ordinal)
        self._context = self._driver.primary_context_retain(self._gpu)
        try:
            self._driver.context_set_current(self._context)
            granularity = self._driver.granularity(self._gpu)
            self.page_bytes = -(-page_bytes // granularity) * granularity
            if memory_bytes < self.page_bytes:
                raise DeviceMisuse(f"{memory_bytes} bytes hold no page of {self.page_bytes} bytes")
            self._streams = (self._driver.stream_create(), self._driver.stream_create())
        except BaseException:
            self._driver.primary_context_release(self._gpu)
            raise
        self.pages_total = memory_bytes // self.page_bytes
        self._table = PageTable(self.page_bytes, self.pages_total)
        self._handles: list[int | None] = [None] * self.pages_total
        self._present = 0
        self._registered: dict[int, int] = {}
        self._copies: dict[int, _Copy] = {}
        self._events: list[int] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._map_calls = 0
        self._copied_bytes = 0
        self._closed = False

    # Addresses.

    def reserve(self, size_bytes: int) -> int:
        """Set addresses aside, once per region; they stay until `release`."""
        size_bytes = self._table.rounded(size_bytes)
        with self._lock:
            self._enter()
            address = self._driver.mem_address_reserve(size_bytes, 0)
            self._table.reserve(address, size_bytes)
        return address

    def release(self, address: int) -> None:
        """Give a reserved range back. Refused while a page is mapped in it."""
        with self._lock:
            size_bytes = self._table.check_release(address)
            self._enter()
            self._driver.mem_address_free(address, size_bytes)
            self._table.release(address)

    # Pages.

    def prefault(self, pages: Sequence[int]) -> int:
        """Create the handles of pages, one at a time, so that a swap waits for one at most."""
        fresh = 0
        for page in pages:
            with self._lock:
                self._enter()
                self._table.check_page(page)
                fresh += self._create(page)
        return fresh

    def map(self, address: int, pages: Sequence[int]) -> None:
        """Map each page's handle, and make the whole range accessible with one call."""
        with self._lock:
            self._enter()
            self._table.check_map(address, pages)
            for page in pages:
                self._create(page)
            mapped = 0
            try:
                for page in pages:
                    place = address + mapped * self.page_bytes
                    handle = self._handles[page]
                    assert handle is not None
                    self._driver.mem_map(place, self.page_bytes, handle)
                    mapped += 1
                self._driver.mem_set_access(address, mapped * self.page_bytes, self._gpu)
            except BaseException:
                if mapped:
                    self._driver.mem_unmap(address, mapped * self.page_bytes)
                raise
            self._table.map(address, pages)
            self._map_calls += 1

    def unmap(self, address: int, count: int) -> tuple[int, ...]:
        """Unmap a range with one call, once the default stream has computed what it was given."""
        with self._lock:
            self._enter()
            pages = self._table.check_unmap(address, count)
            end = address + count * self.page_bytes
            if any(start < end and address < stop for start, stop in self._running("device")):
                raise DeviceMisuse(f"a copy in the {count} pages from {address:#x} on is running")
            self._driver.stream_synchronize(DEFAULT_STREAM)
            self._driver.mem_unmap(address, count * self.page_bytes)
            self._table.unmap(pages)
            self._map_calls += 1
        return pages

    # Copies.

    def register(self, address: int, size_bytes: int, *, writable: bool = False) -> None:
        """Pin host memory. Raises DeviceError that names the limit when the system refuses."""
        if not 0 < size_bytes <= REGISTER_BYTES_MAX:
            raise DeviceMisuse(
                f"cannot register {size_bytes} bytes: at most {REGISTER_BYTES_MAX} a call"
            )
        with self._lock:
            self._enter()
        try:
            # Pinning takes long, so other threads must not have to wait for it here.
            self._driver.host_register(address, size_bytes, read_only=not writable)
        except DriverError as error:
            raise DeviceError(
                f"{size_bytes} bytes of host memory were not pinned ({error}): where the limit "
                "of locked memory is below what images take, raise it (LimitMEMLOCK=infinity in "
                "the unit, or `ulimit -l`); else the host is short of memory, or its driver "
                "cannot register memory that is mapped for reading only",
                code=error.code,
                size_bytes=size_bytes,
            ) from error
        with self._lock:
            self._registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        """Unpin host memory. Refused while a copy from or to it runs."""
        with self._lock:
            self._enter()
            size_bytes = self._registered.get(address)
            if size_bytes is None:
                raise DeviceMisuse(f"{address:#x} is not registered")
            end = address + size_bytes
            if any(start < end and address < stop for start, stop in self._running("host")):
                raise DeviceMisuse(f"a copy of the host memory at {address:#x} is running")
            self._driver.host_unregister(address)
            del self._registered[address]

    def copy_in(self, destination: int, source: int, size_bytes: int) -> int:
        """Issue a copy to the device behind those before it; returns its number."""
        with self._lock:
            self._enter()
            self._table.check_copy(destination, size_bytes)
            copy, stream = self._driver.memcpy_to_device, self._streams[0]
            with self._issuing(stream):
                for offset, count in self._pieces(source, size_bytes):
                    copy(destination + offset, source + offset, count, stream)
                return self._issued(stream, destination, source, size_bytes)

    def copy_out(self, destination: int, source: int, size_bytes: int) -> int:
        """Issue a copy to the host, on a stream of its own since the link has two directions."""
        with self._lock:
            self._enter()
            self._table.check_copy(source, size_bytes)
            self._driver.stream_synchronize(DEFAULT_STREAM)
            copy, stream = self._driver.memcpy_to_host, self._streams[1]
            with self._issuing(stream):
                for offset, count in self._pieces(destination, size_bytes):
                    copy(destination + offset, source + offset, count, stream)
                return self._issued(stream, source, destination, size_bytes)

    def copy_in_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> None:
        """Spread rows, one call each, and wait for them."""
        self._check_rows(destination, row_bytes, rows, pitch_bytes)
        copies = [
            self.copy_in(destination + row * pitch_bytes, source + row * row_bytes, row_bytes)
            for row in range(rows)
        ]
        for copy in copies:
            self.wait(copy)

    def copy_out_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> None:
        """Gather rows, one call each, and wait for them."""
        self._check_rows(source, row_bytes, rows, pitch_bytes)
        copies = [
            self.copy_out(destination + row * row_bytes, source + row * pitch_bytes, row_bytes)
            for row in range(rows)
        ]
        for copy in copies:
            self.wait(copy)

    def _check_rows(self, address: int, row_bytes: int, rows: int, pitch_bytes: int) -> None:
        """Refuse rows that overlap or reach unmapped memory, before the first is copied."""
        with self._lock:
            self._enter()
            self._table.check_copy(address, rows_span(row_bytes, rows, pitch_bytes))

    def wait(self, copy: int) -> None:
        """Wait for one copy; no lock is held, so others are issued and waited for meanwhile."""
        with self._lock:
            self._enter()
            known = self._copies.get(copy)
        if known is not None:
            # Should another thread find it ended first, its event may serve a later copy already:
            # then this waits somewhat longer, and for no less.
            self._driver.event_synchronize(known.event)
            with self._lock:
                self._ended(copy)

    def synchronize(self) -> None:
        """Wait for the copies of this thread."""
        thread = threading.get_ident()
        with self._lock:
            numbers = [number for number, one in self._copies.items() if one.thread == thread]
        for number in numbers:
            self.wait(number)

    # Accounts.

    def statistics(self) -> DeviceStatistics:
        with self._lock:
            return DeviceStatistics(
                pages_total=self.pages_total,
                pages_present=self._present,
                pages_mapped=len(self._table.place),
                reservations=len(self._table.reserved),
                map_calls=self._map_calls,
                copied_bytes=self._copied_bytes,
            )

    def close(self) -> None:
        """Give everything back, once nothing computes. Refused while a copy runs; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._enter()
            if self._running("device"):
                raise DeviceMisuse("a copy is running: join its transfer before closing the device")
            self._closed = True
            driver = self._driver
            driver.stream_synchronize(DEFAULT_STREAM)
            for address, count in self._table.mapped_runs():
                driver.mem_unmap(address, count * self.page_bytes)
            for address, size_bytes in self._table.reserved.items():
                driver.mem_address_free(address, size_bytes)
            self._table.clear()
            for handle in self._handles:
                if handle is not None:
                    driver.mem_release(handle)
            for address in self._registered:
                driver.host_unregister(address)
            for event in self._events:
                driver.event_destroy(event)
            for stream in self._streams:
                driver.stream_destroy(stream)
            self._handles, self._registered, self._events = [], {}, []
            driver.primary_context_release(self._gpu)

    # Inside, with the lock held.

    def _enter(self) -> None:
        """Make the context current in this thread: calls come from several, and torch's too."""
        if self._closed:
            raise DeviceMisuse("the device is closed")
        self._driver.context_set_current(self._context)

    def _create(self, page: int) -> int:
        """Create a page's handle unless it has one; returns how many were created."""
        if self._handles[page] is not None:
            return 0
        try:
            self._handles[page] = self._driver.mem_create(self.page_bytes, self._gpu)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            there, wanted = self._present * self.page_bytes, self.pages_total * self.page_bytes
            raise InsufficientDeviceMemory(
                f"the GPU had no memory left after {there} of the partition's {wanted} bytes: "
                "others use it; end them, or give the partition less memory",
                present_bytes=there,
                total_bytes=wanted,
            ) from error
        self._present += 1
        return 1

    def _pieces(self, host: int, size_bytes: int) -> list[tuple[int, int]]:
        """(offset, bytes) of a copy's parts, none of which crosses the edge of a registration.

        The driver refuses a copy whose host side lies in two registrations.
        """
        edges = {0, size_bytes}
        for start, length in self._registered.items():
            edges.update(
                edge - host for edge in (start, start + length) if 0 < edge - host < size_bytes
            )
        cuts = sorted(edges)
        return [(start, stop - start) for start, stop in itertools.pairwise(cuts)]

    @contextlib.contextmanager
    def _issuing(self, stream: int) -> Iterator[None]:
        """See to it that of a copy whose issue failed half way nothing runs on, unknown to us."""
        try:
            yield
        except BaseException:
            self._driver.stream_synchronize(stream)
            raise

    def _issued(self, stream: int, device: int, host: int, size_bytes: int) -> int:
        if not self._events:
            self._events.append(self._driver.event_create())
        self._driver.event_record(self._events[-1], stream)
        event = self._events.pop()
        number = next(self._numbers)
        ranges = (device, device + size_bytes), (host, host + size_bytes)
        self._copies[number] = _Copy(event, *ranges, threading.get_ident())
        self._copied_bytes += size_bytes
        return number

    def _running(self, side: Literal["device", "host"]) -> list[tuple[int, int]]:
        """One side's addresses of the copies that have not ended yet."""
        for number in [
            number for number, one in self._copies.items() if self._driver.event_done(one.event)
        ]:
            self._ended(number)
        return [one.device if side == "device" else one.host for one in self._copies.values()]

    def _ended(self, number: int) -> None:
        copy = self._copies.pop(number, None)
        if copy is not None:
            self._events.append(copy.event)
