"""The kernel's calls for address ranges, as few plain functions over integers.

It owns the translation between Python and mmap, mremap, madvise and memmove, and the rule that a
range once reserved stays ours: a vacated piece turns into an inaccessible reservation in place,
never into a hole that another thread's mmap could take. It keeps no account of what is where; its
callers do. Every call lets other Python threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from typing import Any

import numpy as np

from swap.errors import DeviceError

HUGE_PAGE_BYTES = 2 << 20
GIGANTIC_BYTES = 1 << 30

_PROT_NONE = 0
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MREMAP_DONTUNMAP = 4
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value
_POPULATE_CALL_BYTES = 1 << 30


class VirtualMemory:
    """Address ranges of this process. Addresses and sizes are in bytes; Linux 5.14 or newer."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        size, address = ctypes.c_size_t, ctypes.c_void_p
        self._mmap = libc.mmap
        number = ctypes.c_int
        self._mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
        self._mmap.restype = address
        self._munmap = libc.munmap
        self._munmap.argtypes = [address, size]
        self._mremap = libc.mremap
        self._mremap.argtypes = [address, size, size, number, address]
        self._mremap.restype = address
        self._madvise = libc.madvise
        self._madvise.argtypes = [address, size, number]

    def reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        """Set an inaccessible range aside; its address is a multiple of `alignment_bytes`."""
        span = size_bytes + alignment_bytes
        start = self._map(0, span, _PROT_NONE, _MAP_NORESERVE, "reserve address space")
        address = -(-start // alignment_bytes) * alignment_bytes
        if address > start:
            self.release(start, address - start)
        if start + span > address + size_bytes:
            self.release(address + size_bytes, start + span - address - size_bytes)
        return address

    def release(self, address: int, size_bytes: int) -> None:
        """Give a range back to the system, with whatever memory is mapped in it."""
        if self._munmap(address, size_bytes) != 0:
            raise self._error(f"unmap {size_bytes} bytes")

    def make_writable(self, address: int, size_bytes: int) -> None:
        """Put fresh zeroed memory over a reserved range: huge pages, present once touched."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._map(address, size_bytes, protection, _MAP_FIXED | _MAP_NORESERVE, "map memory")
        self.prefer_huge_pages(address, size_bytes)

    def make_inaccessible(self, address: int, size_bytes: int) -> None:
        """Turn a range back into a bare reservation in one step; its memory is freed."""
        self._map(address, size_bytes, _PROT_NONE, _MAP_FIXED | _MAP_NORESERVE, "fence a range")

    def move(self, source: int, destination: int, size_bytes: int) -> None:
        """Move memory to another address without copying; the source becomes inaccessible.

        The kernel hands over page tables. It leaves an empty range at the source, which is fenced
        next: the range is never free for others, though it reads as zeros for that moment.
        """
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
        moved = self._mremap(source, size_bytes, size_bytes, flags, destination)
        if moved != destination:
            raise self._error(f"move {size_bytes} bytes of memory")
        self.make_inaccessible(source, size_bytes)

    def prefer_huge_pages(self, address: int, size_bytes: int) -> None:
        """Ask for huge pages in a mapping; without effect where the host does not allow them."""
        self._madvise(address, size_bytes, mmap.MADV_HUGEPAGE)

    def populate(self, address: int, size_bytes: int, *, write: bool) -> None:
        """Make a mapped range present, so that no later access faults; contents stay."""
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        for offset in range(0, size_bytes, _POPULATE_CALL_BYTES):
            count = min(_POPULATE_CALL_BYTES, size_bytes - offset)
            while self._madvise(address + offset, count, advice) != 0:
                if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
                    raise self._error(f"make {count} bytes of memory present")

    def map_file(
        self, descriptor: int, size_bytes: int, *, write: bool = False, offset: int = 0
    ) -> int:
        """Map part of a file, for reading or both; shared with everybody who maps it."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        address = self._mmap(0, size_bytes, protection, mmap.MAP_SHARED, descriptor, offset)
        if address in (None, _MAP_FAILED):
            raise self._error(f"map a segment of {size_bytes} bytes")
        return int(address)

    def map_shared(self, address: int, size_bytes: int, descriptor: int, offset: int) -> None:
        """Put part of a file over a reserved range, to be read and written."""
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        mapped = self._mmap(address, size_bytes, protection, flags, descriptor, offset)
        if mapped in (None, _MAP_FAILED):
            raise self._error(f"map {size_bytes} bytes of a file")

    def copy(self, destination: int, source: int, size_bytes: int) -> None:
        """Plain memmove between addresses."""
        ctypes.memmove(destination, source, size_bytes)

    def copy_rows(
        self,
        destination: int,
        destination_pitch_bytes: int,
        source: int,
        source_pitch_bytes: int,
        row_bytes: int,
        rows: int,
    ) -> None:
        """Copy equal rows that lie at a pitch on either side."""
        # The widest items that fit both sides: numpy copies them faster.
        width = math.gcd(
            destination, destination_pitch_bytes, source, source_pitch_bytes, row_bytes, 8
        )
        into = _rows(destination, destination_pitch_bytes, row_bytes, rows, width)
        np.copyto(into, _rows(source, source_pitch_bytes, row_bytes, rows, width))

    def _map(self, address: int, size_bytes: int, protection: int, flags: int, what: str) -> int:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapped = self._mmap(address, size_bytes, protection, flags, -1, 0)
        if mapped in (None, _MAP_FAILED):
            raise self._error(f"{what} of {size_bytes} bytes")
        return int(mapped)

    @staticmethod
    def _error(what: str) -> DeviceError:
        number = ctypes.get_errno()
        hint = "; raise vm.max_map_count or free memory" if number == errno.ENOMEM else ""
        return DeviceError(f"the system refused to {what}: {os.strerror(number)}{hint}")


def view_of(address: int, size_bytes: int) -> memoryview:
    """Bytes at an address, without a copy. The caller keeps the memory mapped meanwhile."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def _rows(
    address: int, pitch_bytes: int, row_bytes: int, rows: int, width: int
) -> np.ndarray[Any, Any]:
    """Rows at a pitch as one array of items of `width` bytes, without a copy."""
    span = view_of(address, (rows - 1) * pitch_bytes + row_bytes)
    flat = np.frombuffer(span, dtype=f"u{width}")
    shape, strides = (rows, row_bytes // width), (pitch_bytes, width)
    return np.lib.stride_tricks.as_strided(flat, shape, strides)
