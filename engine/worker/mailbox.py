"""How the main thread hands work to the step thread, and how the step thread sleeps.

Owns one queue of functions to call and the condition behind it. It never runs them, and it never
polls: the step thread sleeps until something is posted, or until the moment it asked for.
Invariant: functions are taken in the order in which they were posted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

MAIL_HIGH = 4096
"""Functions waiting, beyond which a link stops being read until the step thread caught up."""

Mail = Callable[[], None]

Result = TypeVar("Result")


def promise() -> Future[Result]:
    """A future that whoever waits for it cannot cancel: only the wait ends, not the work."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()
    return future


class Mailbox:
    """Thread-safe: any thread posts and wakes, the step thread waits and takes."""

    def __init__(self) -> None:
        self._mail: deque[Mail] = deque()
        self._condition = threading.Condition()
        self._woken = False

    @property
    def crowded(self) -> bool:
        return len(self._mail) >= MAIL_HIGH

    def post(self, mail: Mail) -> None:
        """Have the step thread call `mail` before its next step."""
        with self._condition:
            self._mail.append(mail)
            self._condition.notify()

    def wake(self) -> None:
        """Have the step thread look around once more."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until there is mail, somebody called `wake`, or the time is over."""
        with self._condition:
            self._condition.wait_for(lambda: self._mail or self._woken, timeout_s)
            self._woken = False

    def take(self) -> list[Mail]:
        """Everything that waits, oldest first."""
        with self._condition:
            mail = list(self._mail)
            self._mail.clear()
        return mail
