"""Named places where a test can make an operation fail, end the daemon, or hang.

Owns the names and what each action does, and nothing of an operation. A point fires once in a
daemon's life, so that what follows a failure can be watched undisturbed; with none switched on,
reaching one costs a dictionary lookup.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from enum import StrEnum

from daemon.control.errors import ConfigInvalid, ControlError


class FailPoint(StrEnum):
    """Where; named after what has just been done."""

    BEGUN = "begun"  # the operation is in the journal, nothing else happened
    RESERVED = "reserved"  # host memory is set aside
    BUILT = "built"  # the image is sealed, not yet in the store
    STORED = "stored"  # the image is in the store and in custody
    ATTACHED = "attached"  # the worker maps the image
    HELD = "held"  # the gateway holds the outgoing models' requests
    EXCHANGED = "exchanged"  # the worker committed, nothing is journalled
    PLACED = "placed"  # memory and table know, the journal does not
    DRAINED = "drained"  # the worker drained a model, nothing is journalled
    CLEARED = "cleared"  # the workers of partitions that go are gone, no GPU is changed
    CUT = "cut"  # the GPUs are cut anew, the journal does not say so


LAYOUT_POINTS = frozenset({FailPoint.CLEARED, FailPoint.CUT})
"""Those that only a change of layout comes by."""


class Action(StrEnum):
    """What happens there."""

    RAISE = "raise"
    KILL = "kill"
    HANG = "hang"


class FailPointReached(ControlError):
    """A fail point was switched on to `raise`."""


class FailPoints:
    """The points that are switched on."""

    def __init__(self, actions: Mapping[FailPoint, Action]) -> None:
        self._actions = dict(actions)

    async def reach(self, point: FailPoint) -> None:
        """Do what `point` was told to; hanging ends only by cancellation."""
        action = self._actions.pop(point, None)
        if action is None:
            return
        if action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if action is Action.HANG:
            await asyncio.Event().wait()
        raise FailPointReached(f"fail point {point.value} was switched on to {action.value}")


def parse_failpoints(text: str) -> dict[FailPoint, Action]:
    """Read `name=action,name=action`. Raises ConfigInvalid naming what is known."""
    actions: dict[FailPoint, Action] = {}
    for entry in filter(None, text.split(",")):
        name, _, action = entry.partition("=")
        try:
            actions[FailPoint(name)] = Action(action)
        except ValueError as error:
            raise ConfigInvalid(
                f"fail point {entry!r} is not known: names are {', '.join(FailPoint)}; "
                f"actions are {', '.join(Action)}"
            ) from error
    return actions
