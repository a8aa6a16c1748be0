"""Named places where a test can make an exchange fail, end the process, or hang.

Owns the names, what each action does, and nothing of an exchange. Invariant: a point fires once in
a process's life, so that what follows a failure can be watched undisturbed; with no point switched
on, reaching one costs a dictionary lookup.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Trigger:
    """What happens at a point, after it was passed `skip` times."""

    action: Action
    skip: int = 0


class FailPoints:
    """The points that are switched on. Used by the step thread only."""

    def __init__(self, triggers: Mapping[FailPoint, Trigger]) -> None:
        self._triggers = dict(triggers)
        self._passed = dict.fromkeys(triggers, 0)

    def reach(self, point: FailPoint, hang: Callable[[], None]) -> None:
        """Do what `point` was told to; `hang` must wait until somebody interrupts the wait."""
        trigger = self._triggers.get(point)
        if trigger is None:
            return
        if self._passed[point] < trigger.skip:
            self._passed[point] += 1
            return
        del self._triggers[point]
        if trigger.action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if trigger.action is Action.HANG:
            hang()
        raise FailPointReached(f"fail point {point} was switched on to {trigger.action}")


def parse_failpoints(text: str) -> dict[FailPoint, Trigger]:
    """Read `name=action,name+2=action`: the latter lets two pass. Raises OptionInvalid naming
    what is known."""
    triggers: dict[FailPoint, Trigger] = {}
    for entry in filter(None, text.split(",")):
        place, _, action = entry.partition("=")
        name, _, skip = place.partition("+")
        try:
            triggers[FailPoint(name)] = Trigger(Action(action), int(skip or 0))
        except ValueError as error:
            raise OptionInvalid(
                f"fail point {entry!r} is not known: names are {', '.join(FailPoint)}; "
                f"actions are {', '.join(Action)}"
            ) from error
    return triggers
