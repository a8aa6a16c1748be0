"""When the worker looks for objects that refer to each other and are referred to by nothing else.

Owns the times at which Python's cyclic collector is called; it never frees anything by itself. What
an exchange leaves behind refers to itself, by way of callbacks and of the tracebacks of what went
wrong, and an engine that was given up hangs on it. The collector's own counting would come to that
late: it counts objects, and these are few and large.
"""

from __future__ import annotations

import gc


def keep_what_is_there() -> None:
    """What was imported and made so far stays for good: never look at it again, which took 0.1 s
    each time."""
    gc.collect()
    gc.freeze()


class Garbage:
    """What jobs leave behind, collected when nothing else is to be done."""

    def __init__(self) -> None:
        self._due = False

    def left(self) -> None:
        """Something has ended that may have left some."""
        self._due = True

    def collect(self) -> None:
        """Collect what was left, if anything was; takes milliseconds."""
        if self._due:
            self._due = False
            gc.collect()
