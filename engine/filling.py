"""KV that is kept elsewhere, brought to the blocks that requests were given for it.

Owns the copies within an engine's KV memory, those back from host memory, and the account of how
long the latter took. It never decides who is given blocks. Invariant: after `fill`, the KV of every
running request's computed tokens is in its blocks; whose did not come back waits again, and
computes it anew.
"""

from __future__ import annotations

import logging
import time

from engine.block_copies import BlockCopies
from engine.request import Request
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)


class Filling:
    """Fills the blocks of what `scheduler` runs. Nothing else may be writing to them."""

    def __init__(self, scheduler: Scheduler, copies: BlockCopies) -> None:
        self.unparked_s = 0.0
        """Time spent on bringing KV back from host memory."""
        self._scheduler = scheduler
        self._copies = copies

    @property
    def wanted(self) -> bool:
        """Whether `fill` has anything to do."""
        return any(request.incomplete for request in self._scheduler.running)

    def fill(self) -> list[Request]:
        """Bring everything; returns the requests whose parked KV did not come."""
        running = list(self._scheduler.running)
        self._copies.copy(
            [
                (request.source, request.blocks[request.named])
                for request in running
                if request.source is not None
            ]
        )
        for request in running:
            self._scheduler.filled(request)
        return [one for one in running if one.parked is not None and not self._restore(one)]

    def _restore(self, request: Request) -> bool:
        started = time.monotonic()
        try:
            request.restore_kv()
        except Exception:
            log.exception("KV of request %d is computed again: bringing it back", request.id)
            self._scheduler.forget_parked(request)
            return False
        finally:
            self.unparked_s += time.monotonic() - started
        return True
