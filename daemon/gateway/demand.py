"""Reports of demand to hotbayd: on every change, and each second while there is any.

It owns the rhythm and never the counting. A report goes out at once on a first change and then at
most every REPORT_INTERVAL_MIN_S, however many requests arrive; an empty one says that demand ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.link.routes import Demand, ModelDemand

REPORT_INTERVAL_MIN_S = 0.02
REPORT_INTERVAL_MAX_S = 1.0


class DemandReporter:
    """`read` gives all demand; `post` sends a message and says whether hotbayd is connected."""

    def __init__(
        self,
        read: Callable[[], tuple[ModelDemand, ...]],
        post: Callable[[Demand], bool],
    ) -> None:
        self._read = read
        self._post = post
        self._changed = asyncio.Event()
        self._reported: dict[str, int] = {}

    def changed(self) -> None:
        """Demand may have changed; cheap enough to call for each request."""
        self._changed.set()

    def reconnected(self) -> None:
        """A new hotbayd knows nothing yet: whatever demand there is counts as a change."""
        self._reported = {}
        self._changed.set()

    async def run(self) -> None:
        """Report for as long as the task lives."""
        while True:
            self._changed.clear()
            demands = self._read()
            counts = {demand.model: demand.requests for demand in demands}
            if demands or self._reported:
                self._reported = counts if self._post(Demand(demands)) else {}
            await asyncio.sleep(REPORT_INTERVAL_MIN_S)
            try:
                async with asyncio.timeout(REPORT_INTERVAL_MAX_S if counts else None):
                    await self._changed.wait()
            except TimeoutError:
                pass
