"""Named places where a test can make an exchange fail, end the process, hang, or stick.

Owns the names, what each action does, and nothing of an exchange. Invariant: a point fires once in
a process's life, so that what follows a failure can be watched undisturbed, unless it was given a
share: then it fires at that share of its passings, in an order that depends on its name alone. With
no point switched on, reaching one costs a dictionary lookup. Each point belongs to one thread at a
time: most to the step thread, those about bytes under way to the thread that moves them.
"""

from __future__ import annotations

import os
import random
import signal
import threading
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
    UNPACKING = "unpacking"  # a packed image's first piece has arrived
    UNPARKING = "unparking"  # KV of the incoming model is about to be copied back
    PARKING = "parking"  # KV is about to be copied out
    GIVING_WAY = "giving-way"  # KV of a request that gives way to others is about to be copied out
    COPIED = "copied"
    CANARY = "canary"  # verified; the canary is about to be tried
    COMMITTING = "committing"  # verified, and not yet told to anybody
    ROLLING_BACK = "rolling-back"
    STAGING = "staging"  # weights are about to be copied to where nobody needs them yet


class Action(StrEnum):
    """What happens there."""

    RAISE = "raise"
    KILL = "kill"
    HANG = "hang"
    STICK = "stick"  # hang in a call that nobody can interrupt


@dataclass(frozen=True)
class Trigger:
    """What happens at a point, after it was passed `skip` times."""

    action: Action
    skip: int = 0
    share: float = 0.0
    """0: once. Else how many of its passings it fires at."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share of {self.share} is not between 0 and 1")


class FailPoints:
    """The points that are switched on."""

    def __init__(self, triggers: Mapping[FailPoint, Trigger]) -> None:
        self._triggers = dict(triggers)
        self._passed = dict.fromkeys(triggers, 0)
        self._draws = {point: random.Random(point) for point in triggers}

    def reach(self, point: FailPoint, hang: Callable[[], object]) -> None:
        """Do what `point` was told to; `hang` must wait until somebody interrupts the wait."""
        trigger = self._triggers.get(point)
        if trigger is None:
            return
        if self._passed[point] < trigger.skip:
            self._passed[point] += 1
            return
        if not trigger.share:
            del self._triggers[point]
        elif self._draws[point].random() >= trigger.share:
            return
        if trigger.action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if trigger.action is Action.HANG:
            hang()
        if trigger.action is Action.STICK:
            threading.Event().wait()
        raise FailPointReached(f"fail point {point} was switched on to {trigger.action}")


def parse_failpoints(text: str) -> dict[FailPoint, Trigger]:
    """Read `name=action,name+2=action,name~0.1=action`: the second lets two pass, the third fires
    at every tenth on average. Raises OptionInvalid naming what is known."""
    triggers: dict[FailPoint, Trigger] = {}
    for entry in filter(None, text.split(",")):
        place, _, action = entry.partition("=")
        place, _, share = place.partition("~")
        name, _, skip = place.partition("+")
        try:
            triggers[FailPoint(name)] = Trigger(Action(action), int(skip or 0), float(share or 0))
        except ValueError as error:
            raise OptionInvalid(
                f"fail point {entry!r} is not known: names are {', '.join(FailPoint)}; "
                f"actions are {', '.join(Action)}"
            ) from error
    return triggers
