"""What the arena and the transfer need of a device: addresses, physical pages, copies.

It owns the Protocol and its rules; it never says how a device keeps them. The shape is that of
virtual memory on an accelerator: addresses are reserved once and stay, physical pages are created
once and are mapped now here, now there, contents and all, and copies run in order until
`synchronize`. Rules every implementation enforces by raising DeviceMisuse and changing nothing:
a page is mapped at one address at a time, into a reserved range nobody else maps; only mapped
memory is copied to or from; nothing is unmapped while a copy into or out of it runs; a range is
released empty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

REGISTER_BYTES_MAX = 1 << 30
"""Registered by one call at most: pinning holds driver locks that others wait for meanwhile."""


@dataclass(frozen=True)
class DeviceStatistics:
    """Counts since the device was opened; pages are of `page_bytes`."""

    pages_total: int
    pages_present: int
    """Physically there: mapping or filling them again costs no allocation."""
    pages_mapped: int
    reservations: int
    map_calls: int
    """Runs of pages that the system or driver mapped or unmapped."""
    copied_bytes: int
    """In both directions."""


class Clock(Protocol):
    """Time, for pacing a throttled link."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class DeviceMemory(Protocol):
    """One partition's memory. Pages are numbered from 0 to `pages_total` - 1; thread-safe."""

    @property
    def kind(self) -> Literal["host", "cuda"]: ...

    @property
    def page_bytes(self) -> int: ...

    @property
    def pages_total(self) -> int: ...

    @property
    def copies_ahead(self) -> int:
        """Copies worth issuing while an earlier one runs; 0 where issuing a copy is making it."""

    @property
    def keeps_mappings(self) -> bool:
        """Whether mapping a page where it was last is free, for the device kept the mapping."""

    def reserve(self, size_bytes: int) -> int:
        """Set a range of addresses aside (rounded up to pages) and return where it starts."""

    def release(self, address: int) -> None:
        """Give a reserved range back. Refused while a page is mapped in it."""

    def prefault(self, pages: Sequence[int]) -> int:
        """Make pages physically present, wherever they are mapped; returns how many were not.

        Slow (milliseconds a page): call it in the background and ahead of need. Pages that were
        not prefaulted become present when they are first mapped or written to.
        """

    def map(self, address: int, pages: Sequence[int]) -> None:
        """Map pages one after the other from `address` on; contents move with the page.

        Runs of consecutive page numbers are cheap. On failure nothing stays mapped.
        """

    def unmap(self, address: int, count: int) -> tuple[int, ...]:
        """Unmap `count` pages from `address` on and return their numbers, in address order.

        Waits for what is being computed on the device; copies must have ended. A copy to or from
        the addresses is refused afterwards, and any other access fails loudly too unless the device
        `keeps_mappings`.
        """

    def register(self, address: int, size_bytes: int, *, writable: bool = False) -> None:
        """Prepare host memory for fast copies, REGISTER_BYTES_MAX at most a call.

        Copies come from it, and go to it where it is mapped `writable` and said to be. Slow: ahead
        of need, not in a swap. Raises DeviceError when the system refuses.
        """

    def unregister(self, address: int) -> None:
        """Undo `register`. Nothing may be copying from or to that memory."""

    def copy_in(self, destination: int, source: int, size_bytes: int) -> int:
        """Copy host memory at `source` into mapped device memory.

        Returns a number for `wait`; done once that, or `synchronize`, has returned.
        """

    def copy_out(self, destination: int, source: int, size_bytes: int) -> int:
        """Copy mapped device memory at `source` to host memory; see `copy_in`.

        Begins after what was computed on the device so far.
        """

    def wait(self, copy: int) -> None:
        """Wait until one copy, by its number, is complete; copies behind it go on meanwhile."""

    def copy_in_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Spread contiguous host memory over rows of mapped device memory, `pitch_bytes` apart.

        See `copy_in`; one call of the device's, however many rows.
        """

    def copy_out_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        """Gather rows of mapped device memory, `pitch_bytes` apart, into contiguous host memory.

        See `copy_out`. Copies out run beside copies in: a link has both directions.
        """

    def synchronize(self) -> None:
        """Wait until every copy issued by this thread is complete."""

    def statistics(self) -> DeviceStatistics: ...

    def close(self) -> None:
        """Give everything back: pages, addresses, registrations. Idempotent."""
