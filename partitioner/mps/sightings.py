"""What was last seen of each shared place: its server, its clients, and their limits.

It owns one look at a place, what came of the last ones, and their age. It mends nothing: whoever
looks judges and acts. The invariants: asking for what was seen asks no daemon; what is older than
STALE_S is none at all; a client's limits are those that were read back when it was first seen,
since what a daemon is told later binds later clients alone; only a worker that is connected before
and after the daemon is asked for its clients is called astray by the answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from partitioner.errors import MpsCommandError, MpsError
from partitioner.mps.control import Limits, MpsControl, MpsServer, ServerStatus
from partitioner.mps.shared import SharedPlace

STALE_S = 60.0
"""Longer than a look at a place takes whose control program is slow, but in time."""

Workers = Callable[[], Mapping[str, int]]
"""The pids of those that are connected now, by partition."""


class Role(StrEnum):
    """What a process has to do with a place."""

    WORKER = "worker"  # A client, and the worker of one of its shares.
    ASTRAY = "astray"  # The worker of a share, and no client: it runs beside MPS, without limits.
    STRANGER = "stranger"  # A client that is none of ours.


@dataclass(frozen=True)
class SeenProcess:
    """A process of a place. `limits` is None where nobody tells, as of a stranger's."""

    pid: int
    role: Role
    partition: str = ""
    limits: Limits | None = None


@dataclass(frozen=True)
class SeenPlace:
    """A place at one time. `server` is None where there is no control daemon."""

    shared: SharedPlace
    server: ServerStatus | None
    processes: tuple[SeenProcess, ...] = ()
    faults: int = 0
    """How often it was seen in fault, or without a daemon, since this program was started."""

    @property
    def in_fault(self) -> bool:
        """Whether it serves nobody until it is brought back."""
        return self.server in (None, ServerStatus.FAULT)

    @property
    def astray(self) -> tuple[str, ...]:
        """The shares whose workers are no clients."""
        return tuple(each.partition for each in self.processes if each.role is Role.ASTRAY)


class Sightings:
    """Looks at places, and keeps what it saw last of each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, SeenPlace]] = {}
        self._faults: Counter[str] = Counter()

    def latest(self) -> tuple[SeenPlace, ...]:
        """What was seen last of each place, as far as it is not stale."""
        oldest_s = self._clock() - STALE_S
        return tuple(seen for seen_s, seen in self._seen.values() if seen_s >= oldest_s)

    def keep(self, names: Collection[str]) -> None:
        """Forget every place but these."""
        self._seen = {name: each for name, each in self._seen.items() if name in names}

    async def look(self, shared: SharedPlace, control: MpsControl, workers: Workers) -> SeenPlace:
        """Look at a place now.

        Raises `MpsError` where that tells nothing: what does not answer in time may well be sound.
        """
        status: ServerStatus | None = None
        processes: tuple[SeenProcess, ...] = ()
        try:
            status = _worst(await control.servers())
        except MpsCommandError:
            pass  # There is no daemon.
        else:
            if status is not ServerStatus.FAULT:
                processes = await self._processes(shared, control, workers)
        if status in (None, ServerStatus.FAULT):
            self._faults[shared.name] += 1
        seen = SeenPlace(shared, status, processes, self._faults[shared.name])
        self._seen[shared.name] = (self._clock(), seen)
        return seen

    async def _processes(
        self, shared: SharedPlace, control: MpsControl, workers: Workers
    ) -> tuple[SeenProcess, ...]:
        """Everybody there; limits are read back only if somebody has come."""
        before = dict(workers())
        clients = await control.clients()
        now = workers()
        ours = {
            now[name]: name
            for name in shared.partitions
            if name in now and (now[name] == before.get(name) or now[name] in clients)
        }
        known = self._known(shared)
        if any((pid, ours[pid]) not in known for pid in clients if pid in ours):
            told = await _told(shared, control)
            known = {(pid, name): told.get(name) for pid, name in ours.items()} | known
        found = []
        for pid in sorted({*clients, *ours}):
            name = ours.get(pid, "")
            role = Role.WORKER if name else Role.STRANGER
            found.append(
                SeenProcess(pid, role, name, known.get((pid, name)))
                if pid in clients
                else SeenProcess(pid, Role.ASTRAY, name)
            )
        return tuple(found)

    def _known(self, shared: SharedPlace) -> dict[tuple[int, str], Limits | None]:
        """Limits of those workers that were clients before; where none were told, ask again."""
        _, last = self._seen.get(shared.name, (0.0, None))
        return {
            (each.pid, each.partition): each.limits
            for each in (last.processes if last is not None else ())
            if each.limits is not None
        }


async def _told(shared: SharedPlace, control: MpsControl) -> dict[str, Limits]:
    """What each share's client may have: the daemon's limits, tightened by the share's own."""
    try:
        told = await control.limits(len(shared.shares))
    except MpsError:
        return {}  # That limits are not told hides nothing else of the place.
    own = zip(shared.partitions, told, shared.limits, strict=True)
    return {
        name: Limits(
            min(daemon.memory_bytes, share.memory_bytes),
            min(daemon.thread_percent, share.thread_percent),
            share.sm_count,
        )
        for name, daemon, share in own
    }


def _worst(servers: tuple[MpsServer, ...]) -> ServerStatus:
    """One status for a daemon's servers; one that has none will start one for its first client."""
    found = {each.status for each in servers}
    if ServerStatus.FAULT in found:
        return ServerStatus.FAULT
    return ServerStatus.ACTIVE if found == {ServerStatus.ACTIVE} else ServerStatus.STARTING
