"""What an exchange shows to the main thread, and how it is interrupted from there.

Owns the stage, the progress and the interruption of one exchange, for both threads. It never
changes an engine. Invariant: once `seal` has returned, no interruption has any effect, and before
that the first interruption wins; so a commit is never half abandoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from engine.link.control import Exchange, ExchangeResult, Stage, StageReached
from engine.worker.mailbox import promise
from swap.transfer import Transfer


class Order:
    """One exchange as asked for, from its arrival to its end.

    `changed(progress)` is called, on the step thread, when the stage has changed. `done` holds the
    result, or the error with which the exchange was refused before it changed anything.
    """

    def __init__(
        self,
        request: Exchange,
        changed: Callable[[StageReached], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.arrived = clock()
        self.done: Future[ExchangeResult] = promise()
        self.stage = Stage.PLANNING
        self.entered = self.arrived
        self.requests_left = 0
        self._changed = changed
        self._clock = clock
        self._lock = threading.Lock()
        self._interrupted = threading.Event()
        self._error: Exception | None = None
        self._sealed = False
        self._transfer: Transfer | None = None

    # The step thread.

    def enter(self, stage: Stage) -> None:
        """Begin a stage."""
        self.stage, self.entered = stage, self._clock()
        self._changed(self.progress())

    def copying(self, transfer: Transfer | None) -> None:
        """The transfer that an interruption cancels and whose progress is shown."""
        with self._lock:
            self._transfer = transfer
            if transfer is not None and self._error is not None:
                transfer.cancel()

    def check(self) -> None:
        """Raise what the exchange was interrupted with, if it was."""
        if self._error is not None:
            raise self._error

    def hang(self) -> None:
        """Wait for an interruption and raise it."""
        self._interrupted.wait()
        self.check()

    def seal(self) -> None:
        """From here on nothing interrupts. Raises what did before."""
        with self._lock:
            self.check()
            self._sealed = True

    def reopen(self) -> None:
        """Begin to roll back: what interrupted has been heard, and a deadline may do so anew."""
        with self._lock:
            self._error = None
            self._transfer = None
            self._interrupted.clear()
            self.entered = self._clock()

    # Any thread.

    def interrupt(self, error: Exception) -> bool:
        """Have the exchange fail with `error`; False when it is past that."""
        with self._lock:
            if self._sealed:
                return False
            if self._error is None:
                self._error = error
                self._interrupted.set()
                if self._transfer is not None:
                    self._transfer.cancel()
            return True

    def progress(self) -> StageReached:
        """Where the exchange is now."""
        transfer = self._transfer
        return StageReached(
            operation=self.request.operation,
            stage=self.stage,
            bytes_done=transfer.bytes_done if transfer else 0,
            bytes_total=transfer.bytes_total if transfer else 0,
            requests_left=self.requests_left,
        )
