"""A paused engine's last pages on their way to others, with the KV in them parked.

Owns the order in which blocks are vacated, and whose KV is given up where the budget is short. It
never decides that pages must be given up. Invariants: a block is free only after its copy is
complete; nobody's KV is kept at the cost of a request of better rank.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from engine.block_pool import BlockPool
from engine.parking import KvLane, ParkedKv
from engine.request import Request
from engine.scheduler import Scheduler

HAND_OVER_BYTES = 16 << 20
"""Pages are handed on in batches of this size: each costs a turn of the step loop."""

log = logging.getLogger(__name__)


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
            pieces = None if short or not count else self._take(scheduler, request, count)
            if pieces is None:
                # Whoever ranks lower is not served in its place.
                short = short or count > 0
                self.dropped += count > 0
                scheduler.preempt(request)
                continue
            request.parked = parked = ParkedKv(self._lane, pieces)
            parked.begin()
            blocks = scheduler.set_aside(request)
            self._pool.give_back(blocks[count:])
            self._blocks += zip(blocks, pieces, strict=False)
            self._parked.append((request, parked))
            self.parked_bytes += parked.size_bytes
        self._blocks.sort(reverse=True)
        self._pool.trim()

    def _take(self, scheduler: Scheduler, request: Request, count: int) -> tuple[int, ...] | None:
        """Room for a request's KV, if need be in place of what waits behind it."""
        while (pieces := self._lane.area.take(count, self._lane.layout.block_bytes)) is None:
            behind = [
                other
                for other in scheduler.waiting
                if other.parked is not None and other.rank > request.rank
            ]
            if not behind:
                return None
            behind[-1].forget_kv()
            self.dropped += 1
        return pieces

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
                try:
                    for block, piece in moves:
                        self._lane.copy_out(block, piece)
                finally:
                    # Those before the one that failed may be under way still.
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
            written = lost.isdisjoint(parked.pieces)
            if not written and request.parked is parked:
                request.forget_kv()
                self.dropped += 1
            parked.settle(written=written)
        self._parked = []
