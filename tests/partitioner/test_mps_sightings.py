"""What was seen of shared places: kept until stale, limits read back when somebody has come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from partitioner.errors import MpsCommandError
from partitioner.mps.control import Limits, MpsControl, MpsServer, ServerStatus
from partitioner.mps.sightings import STALE_S, Role, SeenProcess, Sightings
from tests.partitioner.test_mps_places import GIB, NOTE

FIRST, SECOND = NOTE.partitions
ACTIVE, FAULT, STARTING = ServerStatus.ACTIVE, ServerStatus.FAULT, ServerStatus.STARTING
OWN = Limits(60 * GIB, 50)


class Daemon:
    """Answers as it is told to, and counts how often limits are asked for."""

    def __init__(self) -> None:
        self.statuses: Sequence[ServerStatus] | None = (ACTIVE,)
        self.pids: tuple[int, ...] = ()
        self.told: tuple[Limits, ...] | None = (Limits(141 * GIB, 100),) * 2
        self.asked = 0

    async def servers(self) -> tuple[MpsServer, ...]:
        if self.statuses is None:
            raise MpsCommandError("no daemon")
        return tuple(MpsServer(7, each) for each in self.statuses)

    async def clients(self) -> tuple[int, ...]:
        return self.pids

    async def limits(self, count: int) -> tuple[Limits, ...]:
        assert count == len(NOTE.shares)
        self.asked += 1
        if self.told is None:
            raise MpsCommandError("it does not say")
        return self.told

    def control(self) -> MpsControl:
        return cast("MpsControl", self)


def looked(sightings: Sightings, daemon: Daemon, workers: dict[str, int]) -> Any:
    return asyncio.run(sightings.look(NOTE, daemon.control(), lambda: workers))


def test_limits_are_those_of_when_a_worker_came_and_asked_for_then_alone() -> None:
    sightings, daemon = Sightings(), Daemon()
    assert looked(sightings, daemon, {}).processes == ()
    daemon.pids = (11, 99)
    seen = looked(sightings, daemon, {FIRST: 11, SECOND: 12, "gpu1/mps0": 13})
    worker = SeenProcess(11, Role.WORKER, FIRST, OWN)
    astray = SeenProcess(12, Role.ASTRAY, SECOND)
    stranger = SeenProcess(99, Role.STRANGER)
    assert seen.processes == (worker, astray, stranger)
    assert (seen.server, seen.in_fault, seen.astray) == (ACTIVE, False, (SECOND,))
    daemon.told = (Limits(GIB, 10),) * 2
    assert looked(sightings, daemon, {FIRST: 11, SECOND: 12}).processes == seen.processes
    assert daemon.asked == 1, "nobody has come since"
    daemon.pids = (11, 12)
    seen = looked(sightings, daemon, {FIRST: 11, SECOND: 12})
    late = SeenProcess(12, Role.WORKER, SECOND, Limits(GIB, 10))
    assert (seen.processes, daemon.asked) == ((worker, late), 2)


def test_limits_that_are_not_told_are_none_and_asked_for_again() -> None:
    sightings, daemon = Sightings(), Daemon()
    daemon.pids, daemon.told = (11,), None
    for asked in (1, 2):
        seen = looked(sightings, daemon, {FIRST: 11})
        assert seen.processes == (SeenProcess(11, Role.WORKER, FIRST),)
        assert daemon.asked == asked


@pytest.mark.parametrize(
    ("statuses", "server", "faults"),
    [
        ((ACTIVE, ACTIVE), ACTIVE, 0),
        ((ACTIVE, STARTING), STARTING, 0),
        ((), STARTING, 0),
        ((ACTIVE, FAULT), FAULT, 2),
        (None, None, 2),
    ],
)
def test_the_worst_server_counts_and_faults_are_counted(
    statuses: Sequence[ServerStatus] | None, server: ServerStatus | None, faults: int
) -> None:
    sightings, daemon = Sightings(), Daemon()
    daemon.statuses = statuses
    looked(sightings, daemon, {})
    seen = looked(sightings, daemon, {FIRST: 11})
    assert (seen.server, seen.faults, seen.in_fault) == (server, faults, faults > 0)
    daemon.statuses = (ACTIVE,)
    seen = looked(sightings, daemon, {})
    assert (seen.server, seen.faults, seen.in_fault) == (ACTIVE, faults, False)


def test_what_was_seen_is_forgotten_when_it_is_stale_or_its_place_is_gone() -> None:
    now = [0.0]
    sightings, daemon = Sightings(clock=lambda: now[0]), Daemon()
    assert sightings.latest() == ()
    seen = looked(sightings, daemon, {})
    now[0] = STALE_S
    assert sightings.latest() == (seen,)
    now[0] += 1
    assert sightings.latest() == ()
    seen = looked(sightings, daemon, {})
    sightings.keep({NOTE.name})
    assert sightings.latest() == (seen,)
    sightings.keep({"gpu1"})
    assert sightings.latest() == ()
