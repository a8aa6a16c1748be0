"""KV of requests on its way out of the device, in host memory, and back.

Owns where each block's bytes lie inside a page, the pieces that a request's KV has in the parking
area, and how fast they were copied. It never decides whose KV is parked. Invariants: a piece being
written belongs to nobody else, even when its request has ended meanwhile; what was never written
whole is never brought back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engine.errors import KvNotParked
from engine.kv_layout import KvLayout
from engine.rates import Pace
from swap.device import DeviceMemory
from swap.parking import ParkingArea


class KvLane:
    """The way between one engine's KV memory, which begins at `address`, and the parking area."""

    def __init__(
        self,
        device: DeviceMemory,
        area: ParkingArea,
        layout: KvLayout,
        address: int,
        *,
        link_bytes_per_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self.area = area
        self.layout = layout
        self.unparking: Callable[[], None] = lambda: None
        """Called before KV is copied back; what it raises counts as a copy that failed."""
        self.giving_way: Callable[[], None] = lambda: None
        """As `unparking`, before KV of a request that gives way is copied out."""
        self._address = address
        self._link_bytes_per_s = link_bytes_per_s
        self._clock = clock
        self._pace = Pace()

    @property
    def bytes_per_s(self) -> float:
        """How fast KV is copied; by what the link is told to do until one was. 0: not known."""
        return self._pace.per_s or self._link_bytes_per_s()

    @contextmanager
    def copying(self, blocks: int) -> Iterator[None]:
        """Copies of so many blocks, issued within; none is under way when this ends."""
        started = self._clock()
        try:
            yield
        finally:
            self.device.synchronize()
        self._pace.note(blocks * self.layout.block_bytes, self._clock() - started)

    def copy_out(self, block: int, address: int) -> None:
        """Gather a block: its rows of all layers, keys and values, become contiguous."""
        self.device.copy_out_rows(address, *self._rows(block))

    def copy_in(self, block: int, address: int) -> None:
        """Spread what `copy_out` gathered over another block."""
        start, row_bytes, rows, pitch_bytes = self._rows(block)
        self.device.copy_in_rows(start, address, row_bytes, rows, pitch_bytes)

    def _rows(self, block: int) -> tuple[int, int, int, int]:
        """(address, bytes of a row, rows, pitch) of a block: a row for each layer's keys, values.

        A page is [layer][K, V][block][head][slot][dim].
        """
        layout = self.layout
        page, place = divmod(block, layout.blocks_per_page)
        rows = 2 * layout.layers
        row_bytes = layout.block_bytes // rows
        start = self._address + page * layout.page_bytes + place * row_bytes
        return start, row_bytes, rows, row_bytes * layout.blocks_per_page


class ParkedKv:
    """The KV of one request in host memory, once it was written there. See
    `engine.request.Parked`."""

    def __init__(self, lane: KvLane, pieces: Sequence[int]) -> None:
        self.pieces = tuple(pieces)
        self._lane = lane
        self._writing = False
        self._written = False
        self._released = False

    @property
    def size_bytes(self) -> int:
        return len(self.pieces) * self._lane.layout.block_bytes

    def write(self, blocks: Sequence[int]) -> None:
        """Copy it out of the first of `blocks`, now. When this has returned or raised, nothing is
        being copied."""
        self._lane.giving_way()
        with self._lane.copying(len(self.pieces)):
            for block, piece in zip(blocks, self.pieces, strict=False):
                self._lane.copy_out(block, piece)
        self._written = True

    def restore(self, blocks: Sequence[int]) -> None:
        """Copy it into the first of `blocks`, which may be any. When this has returned or raised,
        nothing is being copied. Raises KvNotParked if it was never written."""
        if not self._written:
            raise KvNotParked("this KV was to be parked, and never came to host memory")
        self._lane.unparking()
        with self._lane.copying(len(self.pieces)):
            for block, piece in zip(blocks, self.pieces, strict=False):
                self._lane.copy_in(block, piece)

    def begin(self) -> None:
        """Another thread writes to it, until `settle`."""
        self._writing = True

    def settle(self, *, written: bool) -> None:
        """Nothing is written to it any more, and all of it was or not."""
        self._writing, self._written = False, written
        self._free()

    def release(self) -> None:
        """Give its memory back, once nothing is written to it. Idempotent."""
        self._released = True
        self._free()

    def _free(self) -> None:
        if self._released and not self._writing:
            self._lane.area.give_back(self.pieces, self._lane.layout.block_bytes)
            self.pieces = ()
