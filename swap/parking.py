"""Host memory in which the KV of paused requests waits for its model's return.

Owns one range of host memory within a byte budget, and the account of its pieces. It never copies
and never knows whose pieces they are. A request's blocks need not lie together, so that no hole is
too small to be of use. Invariant: free bytes plus taken bytes are the budget, after every call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from swap.device import REGISTER_BYTES_MAX, DeviceMemory
from swap.errors import DeviceError
from swap.virtual_memory import HUGE_PAGE_BYTES, VirtualMemory

log = logging.getLogger(__name__)


class ParkingArea:
    """`limit_bytes` of host memory, by pieces. Of one thread; pieces may be written by others.

    Memory is present from its first use on, or once it is pinned, and stays with the process. 0
    bytes park nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"a parking area cannot have {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._memory = VirtualMemory()
        self._start = 0
        """Where the range begins; 0 until it is needed."""
        self._free = [(0, limit_bytes)] if limit_bytes else []  # (start, end), sorted

    def take(self, count: int, piece_bytes: int) -> tuple[int, ...] | None:
        """Addresses of `count` pieces, all or none: None when the budget is short.

        Raises DeviceError when the system refuses the address space.
        """
        if sum((end - start) // piece_bytes for start, end in self._free) < count:
            return None
        self.open()
        pieces: list[int] = []
        runs: list[tuple[int, int]] = []
        for start, end in self._free:
            fitting = min((end - start) // piece_bytes, count - len(pieces))
            pieces += range(start, start + fitting * piece_bytes, piece_bytes)
            if start + fitting * piece_bytes < end:
                runs.append((start + fitting * piece_bytes, end))
        self._free = runs
        self.used_bytes += count * piece_bytes
        return tuple(self._start + piece for piece in pieces)

    def give_back(self, addresses: Iterable[int], piece_bytes: int) -> None:
        """Return pieces that were taken with this size."""
        runs = list(self._free)
        for address in addresses:
            runs.append((address - self._start, address - self._start + piece_bytes))
            self.used_bytes -= piece_bytes
        self._free = []
        for start, end in sorted(runs):
            if self._free and self._free[-1][1] > start:
                raise ValueError(f"the piece at {start} was given back twice")
            if self._free and self._free[-1][1] == start:
                self._free[-1] = (self._free[-1][0], end)
            else:
                self._free.append((start, end))

    def open(self) -> None:
        """Set the addresses aside; done by the first `take` otherwise. Idempotent.

        Raises DeviceError when the system refuses.
        """
        if not self._start and self.limit_bytes:
            self._start = self._memory.reserve(self._size_bytes, HUGE_PAGE_BYTES)
            self._memory.make_writable(self._start, self._size_bytes)

    def pin(self, device: DeviceMemory) -> int:
        """Have a device copy fast from and to all of it; returns the bytes for which that is so.

        Once, after `open`, from any thread. Slow: ahead of need. What the system does not let be
        pinned is used all the same, and copied more slowly.
        """
        for offset in range(0, self._size_bytes, REGISTER_BYTES_MAX):
            size_bytes = min(REGISTER_BYTES_MAX, self._size_bytes - offset)
            try:
                device.register(self._start + offset, size_bytes, writable=True)
            except DeviceError as error:
                log.warning("KV of paused requests is copied through pageable memory: %s", error)
                return offset
        return self._size_bytes

    def close(self) -> None:
        """Give the memory back to the system. Nothing may be parked."""
        if self.used_bytes:
            raise ValueError(f"{self.used_bytes} bytes are still parked")
        if self._start:
            self._memory.release(self._start, self._size_bytes)
            self._start = 0

    @property
    def _size_bytes(self) -> int:
        return -(-self.limit_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
