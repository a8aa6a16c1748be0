"""Which addresses of a device are set aside, and which page is mapped at which of them.

It owns the account that every device keeps alike, and the refusals that follow from it. It never
calls the system or a driver and takes no lock: the device does both, and notes here what has been
done. Invariant: a page is at one address at most, an address has one page at most, and each lies on
a page's boundary of one reserved range.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from swap.errors import DeviceMisuse


class PageTable:
    """Reserved ranges, and pages 0 to `pages_total` - 1 in them. Checks raise DeviceMisuse."""

    def __init__(self, page_bytes: int, pages_total: int) -> None:
        self.page_bytes = page_bytes
        self.pages_total = pages_total
        self.reserved: dict[int, int] = {}
        """Size in bytes of each reserved range, by where it starts."""
        self.place: dict[int, int] = {}
        """Address of each mapped page."""
        self._page_at: dict[int, int] = {}
        self._starts: list[int] = []

    # Ranges.

    def rounded(self, size_bytes: int) -> int:
        """`size_bytes` in whole pages."""
        if size_bytes <= 0:
            raise DeviceMisuse(f"cannot reserve {size_bytes} bytes")
        return -(-size_bytes // self.page_bytes) * self.page_bytes

    def reserve(self, address: int, size_bytes: int) -> None:
        self.reserved[address] = size_bytes
        bisect.insort(self._starts, address)

    def check_release(self, address: int) -> int:
        """Whether a range may be given back; returns its size in bytes."""
        size_bytes = self.reserved.get(address)
        if size_bytes is None:
            raise DeviceMisuse(f"{address:#x} is not the start of a reserved range")
        for place in range(address, address + size_bytes, self.page_bytes):
            if place in self._page_at:
                raise DeviceMisuse(
                    f"the range at {address:#x} still has page {self._page_at[place]}"
                )
        return size_bytes

    def release(self, address: int) -> None:
        del self.reserved[address]
        self._starts.remove(address)

    # Pages.

    def check_page(self, page: int) -> None:
        if not 0 <= page < self.pages_total:
            raise DeviceMisuse(f"page {page} does not exist: the device has {self.pages_total}")

    def check_map(self, address: int, pages: Sequence[int]) -> None:
        self._check_range(address, len(pages))
        if len(set(pages)) != len(pages):
            raise DeviceMisuse("a page was given twice in one call")
        for index, page in enumerate(pages):
            self.check_page(page)
            if page in self.place:
                raise DeviceMisuse(f"page {page} is mapped already")
            if address + index * self.page_bytes in self._page_at:
                raise DeviceMisuse(f"{address + index * self.page_bytes:#x} is mapped already")

    def map(self, address: int, pages: Sequence[int]) -> None:
        for index, page in enumerate(pages):
            self._page_at[address + index * self.page_bytes] = page
            self.place[page] = address + index * self.page_bytes

    def check_unmap(self, address: int, count: int) -> tuple[int, ...]:
        """Whether `count` pages from `address` on are all mapped; returns them in that order."""
        self._check_range(address, count)
        places = range(address, address + count * self.page_bytes, self.page_bytes)
        if any(place not in self._page_at for place in places):
            raise DeviceMisuse(f"not every page of the {count} from {address:#x} on is mapped")
        return tuple(self._page_at[place] for place in places)

    def unmap(self, pages: Sequence[int]) -> None:
        for page in pages:
            del self._page_at[self.place.pop(page)]

    def check_copy(self, address: int, size_bytes: int) -> None:
        """Whether every page of a copy's device side is mapped."""
        if size_bytes <= 0:
            raise DeviceMisuse(f"cannot copy {size_bytes} bytes")
        base, _ = self._range_of(address)
        first = address - (address - base) % self.page_bytes
        for place in range(first, address + size_bytes, self.page_bytes):
            if place not in self._page_at:
                raise DeviceMisuse(f"a copy at {address:#x} reaches unmapped {place:#x}")

    def clear(self) -> None:
        """Forget everything: it was all given back."""
        self.reserved.clear()
        self.place.clear()
        self._page_at.clear()
        self._starts.clear()

    def _range_of(self, address: int) -> tuple[int, int]:
        index = bisect.bisect_right(self._starts, address) - 1
        base = self._starts[index] if index >= 0 else -1
        if index < 0 or address >= base + self.reserved[base]:
            raise DeviceMisuse(f"{address:#x} is in no reserved range")
        return base, base + self.reserved[base]

    def _check_range(self, address: int, count: int) -> None:
        base, end = self._range_of(address)
        if count <= 0 or (address - base) % self.page_bytes:
            raise DeviceMisuse(f"{count} pages at {address:#x}: not whole pages of the range")
        if address + count * self.page_bytes > end:
            raise DeviceMisuse(f"{count} pages at {address:#x} reach beyond the reserved range")


def rows_span(row_bytes: int, rows: int, pitch_bytes: int) -> int:
    """Bytes from the first row's start to the last one's end."""
    if row_bytes <= 0 or rows <= 0 or pitch_bytes < row_bytes:
        raise DeviceMisuse(
            f"cannot copy {rows} rows of {row_bytes} bytes that are {pitch_bytes} bytes apart"
        )
    return (rows - 1) * pitch_bytes + row_bytes
