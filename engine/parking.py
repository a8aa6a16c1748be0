"""KV of paused requests on its way out of the device, in host memory, and back.

Owns where each block's bytes lie inside a page, the pieces that a request's KV has in the parking
area, and the order in which a paused engine's last pages are vacated. It never decides that pages
must be given up. Invariants: a block is free only after its copy is complete; a piece being written
belongs to nobody else, even when its request has ended meanwhile.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from engine.block_pool import BlockPool
from engine.kv_layout import KvLayout
from engine.request import Request
from engine.scheduler import Scheduler
from swap.device import DeviceMemory
from swap.parking import ParkingArea

HAND_OVER_BYTES = 16 << 20
"""Pages are handed on in batches of this size: each costs a turn of the step loop."""

log = logging.getLogger(__name__)


class KvLane:
    """The way between one engine's KV memory, which begins at `address`, and the parking area."""

    def __init__(
        self, device: DeviceMemory, area: ParkingArea, layout: KvLayout, address: int
    ) -> None:
        self.device = device
        self.area = area
        self.layout = layout
        self.unparking: Callable[[], None] = lambda: None
        """Called before KV is copied back; what it raises counts as a copy that failed."""
        self._address = address

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
    """The KV of one request in host memory. See `engine.request.Parked`."""

    def __init__(self, lane: KvLane, pieces: Sequence[int]) -> None:
        self.pieces = tuple(pieces)
        self._lane = lane
        self._writing = True
        self._released = False

    @property
    def size_bytes(self) -> int:
        return len(self.pieces) * self._lane.layout.block_bytes

    def restore(self, blocks: Sequence[int]) -> None:
        """Copy it into the first of `blocks`, which may be any. When this has returned or raised,
        nothing is being copied."""
        try:
            self._lane.unparking()
            for block, piece in zip(blocks, self.pieces, strict=False):
                self._lane.copy_in(block, piece)
        finally:
            self._lane.device.synchronize()

    def settle(self) -> None:
        """Nothing is written to it any more."""
        self._writing = False
        self._free()

    def release(self) -> None:
        """Give its memory back, once nothing is written to it. Idempotent."""
        self._released = True
        self._free()

    def _free(self) -> None:
        if self._released and not self._writing:
            self._lane.area.give_back(self.pieces, self._lane.layout.block_bytes)
            self.pieces = ()


class Vacating:
    """The last pages of a paused engine on their way to others.

    `copy` is for another thread, once; everything else is the step thread's. Requests that hold a
    block in those pages go back to waiting: with their KV parked, as far as the budget allows by
    rank, or to compute it again.
    """

    def __init__(self, scheduler: Scheduler, pool: BlockPool, lane: KvLane, pages: int) -> None:
        self.dropped = 0
        """Requests whose KV was given up for want of parking."""
        self.parked_bytes = 0
        self.seconds = 0.0
        """How long copying took."""
        self._pool = pool
        self._lane = lane
        self._parked: list[tuple[Request, ParkedKv]] = []
        self._blocks: list[tuple[int, int]] = []  # (block, piece), the last block first
        self._copied = 0
        self._freed = 0
        self._ended = threading.Event()
        self._set_aside(scheduler, max(0, pool.pages - pages) * lane.layout.blocks_per_page)

    def _set_aside(self, scheduler: Scheduler, first: int) -> None:
        layout, short = self._lane.layout, False
        for request in list(scheduler.running):  # best rank first
            if max(request.held, default=-1) < first:
                continue
            count = layout.blocks_for(request.computed) - request.unseen
            pieces = None if short or not count else self._lane.area.take(count, layout.block_bytes)
            if pieces is None:
                # Whoever ranks lower is not served in its place.
                short = short or count > 0
                self.dropped += count > 0
                scheduler.preempt(request)
                continue
            request.parked = parked = ParkedKv(self._lane, pieces)
            blocks = scheduler.set_aside(request)
            self._pool.give_back(blocks[count:])
            self._blocks += zip(blocks, pieces, strict=False)
            self._parked.append((request, parked))
            self.parked_bytes += parked.size_bytes
        self._blocks.sort(reverse=True)
        self._pool.trim()

    @property
    def ended(self) -> bool:
        """Whether nothing is copied any more; `release` has then one last thing to do."""
        return self._ended.is_set()

    def copy(
        self, progress: Callable[[], None], parking: Callable[[], None] = lambda: None
    ) -> None:
        """Copy every block out, from the last page on; `progress` is called after each batch.

        `parking` is called first; what it raises counts as a copy that failed.
        """
        started = time.monotonic()
        layout = self._lane.layout
        batch = max(1, HAND_OVER_BYTES // layout.page_bytes) * layout.blocks_per_page
        try:
            if self._blocks:
                parking()
            for _, group in itertools.groupby(self._blocks, key=lambda move: move[0] // batch):
                moves = list(group)
                for block, piece in moves:
                    self._lane.copy_out(block, piece)
                self._lane.device.synchronize()
                self._copied += len(moves)
                progress()
        except Exception:  # the requests lose their KV by it, and nothing else
            log.exception("copying KV out failed; it will be computed again")
        finally:
            self.seconds = time.monotonic() - started
            self._ended.set()
            progress()

    def release(self) -> None:
        """Free the blocks that are copied, and give back the pages that fall empty by it."""
        ended = self.ended
        copied = len(self._blocks) if ended else self._copied
        self._pool.give_back(block for block, _ in self._blocks[self._freed : copied])
        self._freed = copied
        self._pool.trim()
        if ended:
            self._settle()

    def _settle(self) -> None:
        lost = {piece for _, piece in self._blocks[self._copied :]}
        for request, parked in self._parked:
            if not lost.isdisjoint(parked.pieces) and request.parked is parked:
                request.forget_kv()
                self.dropped += 1
            parked.settle()
        self._parked = []
