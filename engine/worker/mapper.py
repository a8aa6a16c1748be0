"""The thread that maps pages before they are needed, so that no step does.

Owns one thread per worker, which ends with the process, and what it is still to map. It never
takes pages from the pool nor gives any away: the step thread has taken what it maps, so that every
account is the step thread's. Invariant: what fails here is as if it had never been begun.
"""

from __future__ import annotations

import logging
import queue
import threading

from swap.arena import Growth
from swap.errors import SwapError

log = logging.getLogger(__name__)


class Mapper:
    """Maps in the background, one growth after the other. `submit` is for any thread."""

    def __init__(self) -> None:
        self.paused = False
        """Set while pages change hands: nobody is to take any ahead of need then."""
        self._growths: queue.SimpleQueue[Growth] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, growth: Growth) -> None:
        """Have a growth mapped soon. Whoever needs it earlier maps it, or waits for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mapper", daemon=True)
            self._thread.start()
        self._growths.put(growth)

    def _run(self) -> None:
        while True:
            try:
                self._growths.get().run()
            except SwapError as error:
                # A step that needs the pages tries again, and has the error then.
                log.warning("pages could not be mapped ahead of need: %s", error)
