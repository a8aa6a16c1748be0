"""Mending a place under MPS, by what was seen of it now and at earlier looks.

It owns what is remembered of those: who was no client of its daemon, which daemon gave no answer.
It ends no worker itself: `end_worker` does. The invariant: no worker is ended for what a daemon
leaves unsaid, unless that is so at several looks in a row.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

from partitioner.errors import MpsTimeoutError
from partitioner.mps.control import MpsControl
from partitioner.mps.recovery import recover
from partitioner.mps.shared import SharedPlace
from partitioner.mps.sightings import Role, Sightings, Workers

ASTRAY_ENDS_MAX = 3
"""How often a share's worker is ended for being no client; more would only keep it from serving."""
SILENT_LOOKS_MAX = 3
"""At so many looks in a row without an answer a daemon is stuck, and replaced."""

log = logging.getLogger(__name__)

EndWorker = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Mended:
    """The places and partitions whose workers were ended, and what could not be mended."""

    places: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Mending:
    """Mends one place after the other. `note` is told of a place whose daemon is a new one."""

    def __init__(self, sightings: Sightings, note: Callable[[SharedPlace], None]) -> None:
        self._sightings = sightings
        self._note = note
        self._astray: Counter[str] = Counter()
        self._silent: Counter[str] = Counter()

    def forget(self, partitions: Iterable[str]) -> None:
        """These are new: what earlier ones of their names did does not count."""
        for name in partitions:
            del self._astray[name]

    async def look(
        self, shared: SharedPlace, mps: MpsControl, workers: Workers, end_worker: EndWorker
    ) -> Mended:
        """Have this place's server in order, and none of its workers beside it.

        All workers of a faulted place are ended, and so is one that is no client of its daemon: it
        would run beside MPS, without limits. Raises `MpsError` when that cannot be done.
        """

        async def end_all() -> None:
            await _end(end_worker, [name for name in shared.partitions if name in workers()])

        try:
            seen = await self._sightings.look(shared, mps, workers)
            in_fault = seen.in_fault
        except MpsTimeoutError as error:
            self._silent[shared.name] += 1
            if self._silent[shared.name] < SILENT_LOOKS_MAX:
                log.warning("%s is left as it is for now: %s", shared.name, error)
                return Mended()
            in_fault = True
        del self._silent[shared.name]
        if in_fault or (shared.half_made and shared.static):
            # Noted before it is tried, so that the next look tries again what fails. Who is started
            # meanwhile names no multiprocessors, and so is let in by no daemon that gives them:
            # they can be made only while no client is there.
            self._note(replace(shared, sm_partitions=(), limited=False))
            names = await recover(mps, shared.limits, end_all)
            self._note(replace(shared, sm_partitions=names, limited=True))
            return Mended((shared.name,))
        if shared.half_made:
            # Limits can be told under clients, but bind only those who come afterwards.
            await mps.share(shared.limits)
            await end_all()
            self._note(replace(shared, limited=True))
            return Mended((shared.name,))
        self.forget(each.partition for each in seen.processes if each.role is Role.WORKER)
        self._astray.update(seen.astray)
        ended = tuple(name for name in seen.astray if self._astray[name] <= ASTRAY_ENDS_MAX)
        await _end(end_worker, ended)
        given_up = (name for name in seen.astray if self._astray[name] == ASTRAY_ENDS_MAX + 1)
        return Mended(ended, tuple(map(_runs_beside, given_up)))


async def _end(end_worker: EndWorker, names: Iterable[str]) -> None:
    await asyncio.gather(*map(end_worker, names))


def _runs_beside(partition: str) -> str:
    return (
        f"the worker of {partition} has no limits: it was ended {ASTRAY_ENDS_MAX} times and still "
        "is no client of its daemon; look at the worker's log, and apply the layout again"
    )
