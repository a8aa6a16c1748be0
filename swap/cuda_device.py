"""A partition's memory on a CUDA GPU: addresses that stay, and one pool of physical handles.

It owns the partition's handles, one a page, and the reserved ranges. A handle is created once, in
the background or when it is first mapped, and kept until `close`: creating and releasing is by far
the slowest thing the driver does here. How much there is follows from `memory_bytes`, never from
what happens to be free. It never computes, and it never changes what a caller's thread computes on:
the default stream. Invariants: no page passes on under a copy or a kernel; every call runs with
the GPU's primary context current, which torch uses too; what a failed call had done is undone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

from swap.cuda_copies import CudaCopies
from swap.cuda_driver import (
    DEFAULT_STREAM,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    CudaDriver,
    Driver,
    DriverError,
)
from swap.cuda_mappings import CudaMappings
from swap.device import REGISTER_BYTES_MAX, DeviceStatistics
from swap.errors import DeviceError, DeviceMisuse, InsufficientDeviceMemory
from swap.page_table import PageTable, rows_span

PAGE_BYTES = 64 << 20
COPIES_AHEAD = 2
"""With one copy of 64 MiB running (1.2 ms at 55 GB/s) and two behind it, a thread that is woken
within some 2 ms keeps the link busy, and a swap that is given up soon ends."""


class CudaDevice:
    """`memory_bytes` of the GPU's memory in pages (see `swap.device.DeviceMemory`).

    `page_bytes` is rounded up to what the driver can map. Raises DeviceError where there is no
    driver or no such GPU. The first visible GPU is used: choose with CUDA_VISIBLE_DEVICES.

    With `keep_mappings` a page that comes back to where it was is mapped by no call, and unmapping
    makes none; an access to addresses whose page has gone is then refused to copies, but a kernel
    would not fault. Without it such a kernel does.
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
        keep_mappings: bool = True,
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
            self._copies = CudaCopies(self._driver, self._gpu)
        except BaseException:
            self._driver.primary_context_release(self._gpu)
            raise
        self.pages_total = memory_bytes // self.page_bytes
        self._table = PageTable(self.page_bytes, self.pages_total)
        self._handles: list[int | None] = [None] * self.pages_total
        self._present = 0
        self._lock = threading.Lock()
        self._mappings = CudaMappings(self._driver, self._gpu, self.page_bytes, kept=keep_mappings)
        self._closed = False

    @property
    def keeps_mappings(self) -> bool:
        return self._mappings.kept

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
            self._mappings.clear(address, size_bytes)
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
        """Map those handles that are not there from earlier, and make them accessible."""
        with self._lock:
            self._enter()
            self._table.check_map(address, pages)
            self._mappings.map(address, [self._handle_of(page) for page in pages])
            self._table.map(address, pages)

    def unmap(self, address: int, count: int) -> tuple[int, ...]:
        """Let pages go, once the default stream has computed what it was given."""
        with self._lock:
            self._enter()
            pages = self._table.check_unmap(address, count)
            end = address + count * self.page_bytes
            if self._copies.running_in("device", address, end):
                raise DeviceMisuse(f"a copy in the {count} pages from {address:#x} on is running")
            self._driver.stream_synchronize(DEFAULT_STREAM)
            self._mappings.unmap(address, count)
            self._table.unmap(pages)
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
            raise _refused(error, size_bytes) from error
        with self._lock:
            self._copies.registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        """Unpin host memory. Refused while a copy from or to it runs."""
        with self._lock:
            self._enter()
            size_bytes = self._copies.registered.get(address)
            if size_bytes is None:
                raise DeviceMisuse(f"{address:#x} is not registered")
            if self._copies.running_in("host", address, address + size_bytes):
                raise DeviceMisuse(f"a copy of the host memory at {address:#x} is running")
            self._driver.host_unregister(address)
            del self._copies.registered[address]

    def copy_in(self, destination: int, source: int, size_bytes: int) -> int:
        """Issue a copy to the device behind those before it; returns its number."""
        with self._lock:
            self._enter()
            self._table.check_copy(destination, size_bytes)
            return self._copies.issue("in", destination, source, size_bytes)

    def copy_out(self, destination: int, source: int, size_bytes: int) -> int:
        """Issue a copy to the host, on a stream of its own since the link has two directions."""
        with self._lock:
            self._enter()
            self._table.check_copy(source, size_bytes)
            return self._copies.issue("out", source, destination, size_bytes)

    def copy_in_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Issue one copy for all rows; returns its number."""
        with self._lock:
            self._enter()
            self._table.check_copy(destination, rows_span(row_bytes, rows, pitch_bytes))
            shape = (row_bytes, rows, pitch_bytes)
            return self._copies.issue_rows("in", destination, source, *shape)

    def copy_out_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Issue one copy for all rows, behind what is being computed; returns its number."""
        with self._lock:
            self._enter()
            self._table.check_copy(source, rows_span(row_bytes, rows, pitch_bytes))
            shape = (row_bytes, rows, pitch_bytes)
            return self._copies.issue_rows("out", source, destination, *shape)

    def wait(self, copy: int) -> None:
        """Wait for one copy; no lock is held, so others are issued and waited for meanwhile."""
        with self._lock:
            self._enter()
            event = self._copies.event_of(copy)
        if event is not None:
            # Should another thread find it ended first, its event may serve a later copy already:
            # then this waits somewhat longer, and for no less.
            self._driver.event_synchronize(event)
            with self._lock:
                self._copies.ended(copy)

    def synchronize(self) -> None:
        """Wait for the copies of this thread."""
        with self._lock:
            numbers = self._copies.of_thread(threading.get_ident())
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
                map_calls=self._mappings.runs_changed,
                copied_bytes=self._copies.copied_bytes,
            )

    def close(self) -> None:
        """Give everything back, once nothing computes. Refused while a copy runs; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._enter()
            if self._copies.running:
                raise DeviceMisuse("a copy is running: join its transfer before closing the device")
            self._closed = True
            driver = self._driver
            driver.stream_synchronize(DEFAULT_STREAM)
            for address, size_bytes in self._table.reserved.items():
                self._mappings.clear(address, size_bytes)
                driver.mem_address_free(address, size_bytes)
            self._table.clear()
            for handle in self._handles:
                if handle is not None:
                    driver.mem_release(handle)
            self._handles = []
            self._copies.close()
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

    def _handle_of(self, page: int) -> int:
        self._create(page)
        handle = self._handles[page]
        assert handle is not None
        return handle


def _refused(error: DriverError, size_bytes: int) -> DeviceError:
    """Why host memory was not pinned, by the driver's code, and what to change."""
    if error.code == NOT_SUPPORTED:
        why = (
            "this GPU or driver does not register memory that is mapped for reading only: use a "
            "newer driver"
        )
    elif error.code == OUT_OF_MEMORY:
        why = (
            "where the limit of locked memory (RLIMIT_MEMLOCK) is below what images take, raise "
            "it: LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited`; else the host is "
            "short of memory"
        )
    else:
        why = "see the driver's log (dmesg) for the reason"
    return DeviceError(
        f"{size_bytes} bytes of host memory were not pinned ({error}): {why}",
        code=error.code,
        size_bytes=size_bytes,
    )
