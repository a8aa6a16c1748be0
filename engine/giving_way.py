"""KV of running requests that give way for want of blocks: parked, or left to be computed again.

Owns the decision, by what was measured, and the copies that it leads to. It never decides who gives
way: the scheduler does, and hands the blocks on at once; what is in them stays until something is
launched, and is copied before that. Invariant: after `copy` or `drop` nothing is left to be copied,
and whose KV did not come to host memory computes it again.
"""

from __future__ import annotations

import itertools
import logging

from engine.block_pool import BlockPool
from engine.parking import KvLane, ParkedKv
from engine.rates import Pace, Rates, worth_parking
from engine.request import Request
from swap.errors import DeviceError

log = logging.getLogger(__name__)


class GivingWay:
    """Parks by way of `lane`; without one everything is computed again.

    `park` is the scheduler's, and `computed` told of steps. Nothing may be computing while `copy`
    runs.
    """

    def __init__(self, pool: BlockPool, lane: KvLane | None) -> None:
        self.computed = Pace()
        """How fast tokens are computed in steps that have prompts in them."""
        self.parked = 0
        """How many times KV was parked so far."""
        self.allowed = True
        """Whether what was computed can be relied on, so that it is worth keeping."""
        self._pool = pool
        self._lane = lane
        self._pending: list[tuple[Request, ParkedKv, tuple[int, ...]]] = []

    @property
    def wanted(self) -> bool:
        """Whether `copy` has anything to do."""
        return bool(self._pending)

    def park(self, request: Request) -> ParkedKv | None:
        """Where the KV of a running request is to go, which still has its blocks; None if it is to
        be computed again."""
        if self._lane is None or not self.allowed:
            return None
        layout, area = self._lane.layout, self._lane.area
        count = layout.blocks_for(request.computed) - request.unseen
        blocks = tuple(request.held[:count])
        # What others hold as well is found again without being computed.
        own = list(itertools.dropwhile(lambda block: self._pool.holds(block) > 1, blocks))
        shared = len(blocks) - len(own)
        found = (request.unseen + shared) * layout.block_tokens if shared else 0
        tokens = max(0, request.computed - found)
        rates = Rates(self.computed.per_s, self._lane.bytes_per_s)
        if not worth_parking(tokens, len(blocks) * layout.block_bytes, rates):
            return None
        try:
            pieces = area.take(len(blocks), layout.block_bytes)
        except DeviceError as error:
            log.warning("KV of request %d is computed again: %s", request.id, error)
            return None
        if pieces is None:
            return None
        parked = ParkedKv(self._lane, pieces)
        self._pending.append((request, parked, blocks))
        return parked

    def copy(self) -> None:
        """Copy KV out of what were its requests' blocks."""
        pending, self._pending = self._pending, []
        for request, parked, blocks in pending:
            if request.parked is not parked:
                continue  # it has ended meanwhile
            try:
                parked.write(blocks)
            except Exception:
                log.exception("KV of request %d is computed again: parking it", request.id)
                _give_up(request)
            else:
                self.parked += 1

    def drop(self) -> None:
        """Leave uncopied what is still to be: its blocks may be anybody's by now."""
        pending, self._pending = self._pending, []
        for request, parked, _ in pending:
            if request.parked is parked:
                _give_up(request)


def _give_up(request: Request) -> None:
    # One that has blocks again already finds out when they are to be filled.
    if not request.blocks:
        request.forget_kv()
