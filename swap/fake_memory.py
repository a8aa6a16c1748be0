"""The memory of a fake GPU: physical handles, reserved addresses, and what is mapped where.

It owns a file in memory of which a physical handle is a piece; mapping and giving access put that
piece over reserved addresses, and an access before that, or after unmapping, faults. It enforces
the driver's rules about sizes, ranges and order, and knows nothing of contexts, copies and kernels.
Invariant: a call that raises has changed nothing. Not thread-safe: the fake driver has the lock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from swap.cuda_driver import INVALID_VALUE, OUT_OF_MEMORY, DriverError
from swap.virtual_memory import VirtualMemory

GRANULARITY_BYTES = 2 << 20


@dataclass
class _Handle:
    """Physical memory: a piece of the file. It lives until released and mapped nowhere."""

    offset: int
    size_bytes: int
    mappings: int = 0
    released: bool = False


@dataclass
class _Mapping:
    size_bytes: int
    handle: _Handle
    accessible: bool = False


class FakeMemory:
    """`memory_bytes` of it. Methods are the driver's calls by their names without `cuMem`."""

    def __init__(self, memory_bytes: int) -> None:
        self.unmaps_ranges = True
        """Whether one call unmaps several handles; the driver's documentation leaves that open."""
        self._memory_bytes = memory_bytes
        self._memory = VirtualMemory()
        self._file = os.memfd_create("fake GPU", os.MFD_CLOEXEC)
        self._file_bytes = 0
        self._vacant: dict[int, list[int]] = {}
        self._reserved: dict[int, int] = {}
        self._handles: dict[int, _Handle] = {}
        self._mappings: dict[int, _Mapping] = {}
        self._next_handle = 1 << 8

    def holdings(self) -> dict[str, int]:
        return {
            "reservations": len(self._reserved),
            "handles": len(self._handles),
            "mappings": len(self._mappings),
        }

    def close(self) -> None:
        """Free everything, whether it was given back or not."""
        for address, size_bytes in self._reserved.items():
            self._memory.release(address, size_bytes)
        os.close(self._file)

    def reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        _check_whole("cuMemAddressReserve", size_bytes)
        if alignment_bytes & (alignment_bytes - 1):
            raise DriverError("cuMemAddressReserve", INVALID_VALUE)
        address = self._memory.reserve(size_bytes, max(alignment_bytes, GRANULARITY_BYTES))
        self._reserved[address] = size_bytes
        return address

    def free(self, address: int, size_bytes: int) -> None:
        if self._reserved.get(address) != size_bytes or self._mapped(address, size_bytes):
            raise DriverError("cuMemAddressFree", INVALID_VALUE)
        self._memory.release(address, size_bytes)
        del self._reserved[address]

    def create(self, size_bytes: int) -> int:
        _check_whole("cuMemCreate", size_bytes)
        held = sum(handle.size_bytes for handle in self._handles.values())
        if held + size_bytes > self._memory_bytes:
            raise DriverError("cuMemCreate", OUT_OF_MEMORY)
        vacant = self._vacant.get(size_bytes)
        if vacant:
            offset = vacant.pop()
        else:
            offset, self._file_bytes = self._file_bytes, self._file_bytes + size_bytes
            os.ftruncate(self._file, self._file_bytes)
        self._next_handle += 1
        self._handles[self._next_handle] = _Handle(offset, size_bytes)
        return self._next_handle

    def release(self, number: int) -> None:
        """The memory stays for as long as it is mapped."""
        handle = self._handle(number, "cuMemRelease")
        handle.released = True
        del self._handles[number]
        self._recycle(handle)

    def map(self, address: int, size_bytes: int, number: int) -> None:
        handle = self._handle(number, "cuMemMap")
        free = self._is_reserved(address, size_bytes) and not self._mapped(address, size_bytes)
        if not free or size_bytes != handle.size_bytes or address % GRANULARITY_BYTES:
            raise DriverError("cuMemMap", INVALID_VALUE)
        handle.mappings += 1
        self._mappings[address] = _Mapping(size_bytes, handle)

    def set_access(self, address: int, size_bytes: int) -> None:
        for place in self._whole_mappings("cuMemSetAccess", address, size_bytes):
            mapping = self._mappings[place]
            offset = mapping.handle.offset
            self._memory.map_shared(place, mapping.size_bytes, self._file, offset)
            mapping.accessible = True

    def unmap(self, address: int, size_bytes: int) -> None:
        places = self._whole_mappings("cuMemUnmap", address, size_bytes)
        if len(places) > 1 and not self.unmaps_ranges:
            raise DriverError("cuMemUnmap", INVALID_VALUE)
        self._memory.make_inaccessible(address, size_bytes)
        for place in places:
            handle = self._mappings.pop(place).handle
            handle.mappings -= 1
            self._recycle(handle)

    def _handle(self, number: int, call: str) -> _Handle:
        if number not in self._handles:
            raise DriverError(call, INVALID_VALUE)
        return self._handles[number]

    def _recycle(self, handle: _Handle) -> None:
        if handle.released and not handle.mappings:
            self._vacant.setdefault(handle.size_bytes, []).append(handle.offset)

    def _is_reserved(self, address: int, size_bytes: int) -> bool:
        return any(
            start <= address and address + size_bytes <= start + length
            for start, length in self._reserved.items()
        )

    def _mapped(self, address: int, size_bytes: int) -> list[int]:
        """Mappings that a range touches, in address order."""
        wanted = (address, address + size_bytes)
        return sorted(
            place
            for place, mapping in self._mappings.items()
            if overlap((place, place + mapping.size_bytes), wanted)
        )

    def _whole_mappings(self, call: str, address: int, size_bytes: int) -> list[int]:
        """The mappings that tile a range, none of them in part and without a hole."""
        places, end = self._mapped(address, size_bytes), address
        for place in places:
            if place != end:
                raise DriverError(call, INVALID_VALUE)
            end += self._mappings[place].size_bytes
        if not places or end != address + size_bytes:
            raise DriverError(call, INVALID_VALUE)
        return places

    def accessible(self, address: int, size_bytes: int) -> bool:
        """Whether all of a range is mapped and may be accessed."""
        places, end = self._mapped(address, size_bytes), address
        for place in places:
            mapping = self._mappings[place]
            if place > end or not mapping.accessible:
                return False
            end = place + mapping.size_bytes
        return bool(places) and end >= address + size_bytes


def _check_whole(call: str, size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % GRANULARITY_BYTES:
        raise DriverError(call, INVALID_VALUE)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges, as (start, end), have an address in common."""
    return one[0] < other[1] and other[0] < one[1]
