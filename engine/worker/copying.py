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
from swap.shared_link import Link, Turn
from swap.transfer import Reached

Waits = Generator[float | None, None, None]
"""A job of the step loop: it yields the monotonic time at which it wants to be resumed at the
latest, or None to be resumed once something has happened."""


class Copy:
    """A copy under way, once its turn at the link has come. `reached` is the transfer's."""

    def __init__(
        self,
        resident: Resident,
        order: Order,
        wake: Callable[[], None],
        link: Link,
        reached: Reached = lambda place, cancelled: None,
    ) -> None:
        self._order = order
        self._wake = wake
        self._ended = False
        self._transfer = resident.load(link.turn(background=resident.spare), wake, reached)
        self._order.copying(self._transfer)
        name = "end of " + resident.model
        threading.Thread(target=self._await_end, name=name, daemon=True).start()

    def pause(self, paused: bool) -> None:
        """Stand still once the copy call under way has ended, or go on."""
        self._transfer.pause(paused)

    @property
    def seconds(self) -> float:
        """How long copying alone took, once it has ended."""
        return self._transfer.seconds

    def is_of(self, resident: Resident) -> bool:
        """Whether this is still the copy that fills the resident's pages."""
        return resident.weights.transfer is self._transfer

    @property
    def turn(self) -> Turn:
        """Its turn at the link: how long it waited for that."""
        return self._transfer.turn

    @property
    def bytes_total(self) -> int:
        """Bytes that cross the link."""
        return self._transfer.bytes_total

    def wait(self, check: Callable[[], None] = lambda: None) -> Waits:
        """Until every byte is there. Raises what interrupted it, or what `check` does of a copy
        that has ended, else what the transfer raised."""
        while not self._ended:
            yield None
        self._order.check()
        check()
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
