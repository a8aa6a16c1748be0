"""Who has NVML open, so that all of it can be let go of for the moment of a reset.

It owns a count and a wish. It opens and closes nothing itself. The driver resets a GPU only when no
process has it open, and this process has, as long as one of its threads does. The invariant: while
somebody is alone nobody else begins to use NVML; whoever has to wait too long gives up, and others
go on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from partitioner.errors import ResetNeededError

ALONE_WAIT_S = 5.0


class NvmlGate:
    """Shared by whoever opens NVML in this process but the one that resets."""

    def __init__(self, wait_s: float = ALONE_WAIT_S) -> None:
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._users = 0
        self._alone = False

    @property
    def wanted(self) -> bool:
        """Whether those who use NVML are to let go of it now."""
        return self._alone

    @contextmanager
    def using(self) -> Iterator[None]:
        """Use NVML; waits while somebody is alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one. Raises `ResetNeededError` when others do not let go in time."""
        with self._changed:
            self._alone = True
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._users, self._wait_s):
                    raise ResetNeededError(
                        "a thread of hotbayd does not let go of NVML, so no GPU can be reset; the "
                        "driver may be stuck: look at its kernel log (dmesg)"
                    )
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
