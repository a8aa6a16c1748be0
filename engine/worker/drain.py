"""Ending or setting aside what a model runs, by policy.

Owns the four policies and nothing of an exchange. It never waits itself: it is a generator that
yields the time of its next look, and the step loop goes on stepping meanwhile. Invariant: when it
is done nothing of the model runs, and every request of it was finished, answered, or is kept:
with its KV, unless the policy drops that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.link.control import EngineStatus, InFlight
from engine.link.tokens import Finish
from engine.worker.copying import Waits
from engine.worker.desk import Desk
from engine.worker.resident import Resident


@dataclass
class DrainCounts:
    """What became of the requests. `finished` ended as they would have anyway."""

    finished: int = 0
    kept: int = 0
    lost: int = 0


def drain(
    residents: Sequence[Resident],
    in_flight: InFlight,
    timeout_s: float,
    desk: Desk,
    clock: Callable[[], float],
    counts: DrainCounts,
) -> Waits:
    """Bring ACTIVE residents to STAGED. Requests that wait are kept only if tokens were sent."""
    keep_kv = in_flight in (InFlight.DRAIN, InFlight.PRESERVE)
    active = [one for one in residents if one.status is EngineStatus.ACTIVE]
    for resident in active:
        resident.move(EngineStatus.DRAINING)
        _requeue_unstarted(resident, desk, everything=not keep_kv)
        if in_flight is InFlight.ABORT:
            for number in desk.of_model(resident.model):
                resident.cancel(number)
                counts.lost += desk.end(number, Finish.ABORT, "ended by a swap of the model")
    desk.flush()
    if in_flight is InFlight.DRAIN:
        begun = sum(len(desk.of_model(one.model)) for one in active)
        deadline = clock() + timeout_s
        while any(desk.of_model(one.model) for one in active) and clock() < deadline:
            yield deadline
        counts.finished = begun - sum(len(desk.of_model(one.model)) for one in active)
    for resident in active:
        if resident.status is EngineStatus.DRAINING:  # and did not fail meanwhile
            _requeue_unstarted(resident, desk, everything=not keep_kv)
            resident.pause(keep_kv=keep_kv)
            resident.move(EngineStatus.STAGED)
            counts.kept += len(desk.of_model(resident.model))
    desk.flush()


def _requeue_unstarted(resident: Resident, desk: Desk, *, everything: bool) -> None:
    """Hand requests back of which no token was sent; with `everything` those in a batch as well.

    They can run wherever the model comes up first, and lose nothing but what a batch computed.
    """
    running = frozenset() if everything else resident.engine.running_requests
    for number in desk.of_model(resident.model):
        if number not in running and not desk.told(number):
            resident.cancel(number)
            desk.end(number, Finish.REQUEUE)
