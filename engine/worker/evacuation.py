"""Pages of paused engines on their way to a model that comes in.

Owns the thread that copies KV out while weights are copied in, and hands vacated pages on as they
fall free. It never decides whose pages go. Invariant: once `wait` has returned, nothing is being
copied out, and every block and every parked byte is where the accounts say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from engine.vacating import Vacating
from engine.worker.copying import Waits
from engine.worker.resident import Resident


class Evacuation:
    """One exchange's vacating, of several engines one after the other; it begins at once.

    `parking` is called on its thread before KV is copied (see `Vacating.copy`).
    """

    def __init__(
        self,
        vacatings: Sequence[tuple[Resident, Vacating]],
        wake: Callable[[], None],
        parking: Callable[[], None] = lambda: None,
    ) -> None:
        self.residents = [resident for resident, _ in vacatings]
        self._vacatings = [vacating for _, vacating in vacatings]
        self._wake = wake
        self._parking = parking
        threading.Thread(target=self._copy, name="evacuation", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether nothing is copied any more."""
        return all(one.ended for one in self._vacatings)

    @property
    def parked_bytes(self) -> int:
        """KV that goes to host memory."""
        return sum(one.parked_bytes for one in self._vacatings)

    @property
    def seconds(self) -> float:
        """How long copying took, once it has ended."""
        return sum(one.seconds for one in self._vacatings)

    def release(self) -> bool:
        """Free the pages vacated so far; whether those were all."""
        ended = self.ended
        for vacating in self._vacatings:
            vacating.release()
        return ended

    def wait(self) -> Waits:
        """Until nothing is copied and every vacated page is free."""
        while not self.release():
            yield None

    def _copy(self) -> None:
        for vacating in self._vacatings:
            vacating.copy(self._wake, self._parking)
