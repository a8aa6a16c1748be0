"""Named places where a test can make an exchange fail, end the process, or hang.

Owns the names, what each action does, and nothing of an exchange. Invariant: a point fires once in
a process's life, so that what follows a failure can be watched undisturbed; with no point switched
on, reaching one costs a dictionary lookup.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from enum import StrEnum

from engine.worker.errors import FailPointReached, OptionInvalid


class FailPoint(StrEnum):
    """Where; named after what has just been done or is about to be done."""

    PLANNED = "planned"
    DRAINED = "drained"
    EVICTED = "evicted"
    COPYING = "copying"  # the copy has begun
    COPIED = "copied"
    COMMITTING = "committing"  # verified, and not yet told to anybody
    ROLLING_BACK = "rolling-back"


class Action(StrEnum):
    """What happens there."""

    RAISE = "raise"
    KILL = "kill"
    HANG = "hang"


class FailPoints:
    """The points that are switched on. Used by the step thread only."""

    def __init__(self, actions: Mapping[FailPoint, Action]) -> None:
        self._actions = dict(actions)

    def reach(self, point: FailPoint, hang: Callable[[], None]) -> None:
        """Do what `point` was told to; `hang` must wait until somebody interrupts the wait."""
        action = self._actions.pop(point, None)
        if action is None:
            return
        if action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if action is Action.HANG:
            hang()
        raise FailPointReached(f"fail point {point} was switched on to {action}")


def parse_failpoints(text: str) -> dict[FailPoint, Action]:
    """Read `name=action,name=action`. Raises OptionInvalid naming what is known."""
    actions: dict[FailPoint, Action] = {}
    for entry in filter(None, text.split(",")):
        name, _, action = entry.partition("=")
        try:
            actions[FailPoint(name)] = Action(action)
        except ValueError as error:
            raise OptionInvalid(
                f"fail point {entry!r} is not known: names are {', '.join(FailPoint)}; "
                f"actions are {', '.join(Action)}"
            ) from error
    return actions
