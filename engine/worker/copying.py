"""One image on its way into a resident's pages, as seen from the step loop.

Owns the transfer and the thread that tells the step loop of its end. It never decides what follows.
Invariant: once `wait` has returned or raised, or `stop` has returned, nothing is being copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

from engine.worker.order import Order
from engine.worker.resident import Resident
from swap.errors import SwapError

Waits = Generator[float | None, None, None]
"""A job of the step loop: it yields the monotonic time at which it wants to be resumed at the
latest, or None to be resumed once something has happened."""


class Copy:
    """A copy under way; the resident may be stepped behind its gate as soon as this exists."""

    def __init__(self, resident: Resident, order: Order, wake: Callable[[], None]) -> None:
        self._order = order
        self._wake = wake
        self._ended = False
        self._transfer = resident.load()
        self._order.copying(self._transfer)
        name = "end of " + resident.model
        threading.Thread(target=self._await_end, name=name, daemon=True).start()

    @property
    def seconds(self) -> float:
        """How long copying alone took, once it has ended."""
        return self._transfer.seconds

    def wait(self) -> Waits:
        """Until every byte is there. Raises what interrupted it, else what the transfer raised."""
        while not self._ended:
            yield None
        self._order.check()
        self._transfer.join()

    def stop(self) -> Waits:
        """Give the copy up, and return once nothing is being copied."""
        self._transfer.cancel()
        while not self._ended:
            yield None

    def _await_end(self) -> None:
        try:
            self._transfer.join()
        except SwapError:
            pass  # `wait` raises it on the step thread
        finally:
            self._ended = True
            self._wake()
