"""The places of a node that are shared: a control daemon for each, kept by note and by answer.

It owns the directories under its root, and the daemons there. It decides no layout and ends no
worker. The invariants: a place counts as shared when its note says so and its daemon answers; a
place is `ready` only after a look from inside; one thing is done at a time, so that nobody mends a
daemon that another is taking down. GPUs' compute mode is left alone: who comes in is looked at
instead, and so nothing has to be restored, whoever crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from partitioner.errors import MpsError, MpsShareError
from partitioner.geometry import Instance
from partitioner.gpu import Gpu
from partitioner.layout import Share
from partitioner.mps import shared as notes
from partitioner.mps.commands import REAL_CONTROL
from partitioner.mps.control import Language, Limits, MpsControl
from partitioner.mps.lifetime import PID_FILE
from partitioner.mps.mending import EndWorker, Mended, Mending
from partitioner.mps.preflight import look
from partitioner.mps.probing import control, language_of, refuse_without_static
from partitioner.mps.shared import SharedPlace
from partitioner.mps.sightings import SeenPlace, Sightings, Workers

RELEASE_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Programs:
    """What runs: the control program, a client that looks around, what workers are started by."""

    look: tuple[str, ...]
    control: tuple[str, ...] = REAL_CONTROL
    prefix: tuple[str, ...] = ()


class MpsPlaces:
    """Shares and unshares places; `root` is where the daemons' directories are."""

    def __init__(self, root: Path, programs: Programs, boot_id: str) -> None:
        self._root = root
        self._programs = programs
        self._boot_id = boot_id
        self._turn = asyncio.Lock()
        self._sightings = Sightings()
        self._mending = Mending(self._sightings, partial(notes.write, root))

    def noted(self) -> tuple[SharedPlace, ...]:
        """The places whose shares can serve, according to the notes."""
        return tuple(each for each in self._notes() if each.ready)

    async def shared(self, gpu: str) -> Mapping[Instance | None, tuple[Share, ...]]:
        """What a GPU's places are divided into now; nothing where it is only half done."""
        found = {}
        for each in self._notes():
            if each.gpu == gpu:
                found[each.place] = each.shares if await self._whole(each) else ()
        return found

    async def _whole(self, shared: SharedPlace) -> bool:
        try:
            return shared.ready and await self._control(shared).answers()
        except MpsError:  # There is not even a program any more.
            return False

    async def refuse_missing(self, shares: Collection[Share]) -> None:
        """Raise `MpsUnavailableError` without a control program that has what these shares take."""
        if shares:
            await language_of(self._programs.control, self._root)
        if any(each.sm_count for each in shares):
            await refuse_without_static(self._programs.control, self._root)

    async def share(self, gpu: Gpu, place: Instance | None, shares: tuple[Share, ...]) -> None:
        """Divide a place so. Shares that it has already with the same limits are not disturbed."""
        language = Language.LEGACY
        static = any(each.sm_count for each in shares)
        if place is None and not static:  # Namespaces are promised for whole GPUs only.
            language = await language_of(self._programs.control, self._root)
        wanted = _described(gpu, place, shares, language, self._boot_id)
        async with self._turn:
            old = next((each for each in self._notes() if each.name == wanted.name), None)
            if old is not None and (old.language, old.device) != (language, wanted.device):
                await self._control(old).stop()
                old = None
            mps = self._control(wanted)
            kept: tuple[Limits, ...] = ()
            limited = True
            if old is not None and old.ready and await mps.answers():
                # Its clients keep what they came in with; where it is static it ends, and they too.
                limited = old.limited or old.static
                if wanted.static and old.limits == wanted.limits:
                    # It could only be made anew, under its clients.
                    notes.write(self._root, replace(old, shares=shares))
                    return
                kept = () if wanted.static or old.static else old.limits
            notes.write(self._root, wanted)
            if old is not None and old.static:
                await mps.stop()  # Nobody comes in there without multiprocessors of his own.
            names = await mps.share(wanted.limits)
            wanted = replace(wanted, sm_partitions=names)
            fresh = [
                number
                for number, limits in enumerate(wanted.limits)
                if number >= len(kept) or kept[number] != limits
            ]
            await look(wanted, mps, self._programs.look, fresh)
            notes.write(self._root, replace(wanted, ready=True, limited=limited or wanted.static))
            self._mending.forget(wanted.partitions)

    async def unshare(self, gpu: str, place: Instance | None) -> None:
        """Have no daemon there any more."""
        async with self._turn:
            for each in self._notes():
                if (each.gpu, each.place) == (gpu, place):
                    await self._control(each).stop()
                    notes.remove(self._root, each)
            self._sightings.keep({each.name for each in self._notes()})

    def pids(self) -> frozenset[int]:
        """The daemons and their servers."""
        found: set[int] = set()
        for each in self._notes():
            try:
                file = self._control(each).pipe_directory / PID_FILE
                daemon = psutil.Process(int(file.read_text()))
                found |= {daemon.pid, *(child.pid for child in daemon.children(recursive=True))}
            except (OSError, ValueError, psutil.Error):
                continue  # It does not run.
        return frozenset(found)

    def prefix(self, partition: str) -> tuple[str, ...]:
        """What a worker's command line begins with, for it to be a client; empty for no share."""
        for each in self.noted():
            if partition in each.partitions:
                number = each.partitions.index(partition)
                variables = each.environment(self._control(each), number)
                words = (f"{name}={value}" for name, value in variables.items())
                return ("env", *words, *self._programs.prefix)
        return ()

    async def release(self, partition: str, pid: int) -> None:
        """Take a client's contexts from it, since it is about to be killed with work in flight.

        Killed without that it may leave its server and the other clients undefined.
        """
        for each in self.noted():
            if partition in each.partitions:
                with contextlib.suppress(MpsError, TimeoutError):
                    async with asyncio.timeout(RELEASE_TIMEOUT_S):
                        await self._control(each).terminate(pid)

    # While they serve.

    async def restore(self) -> tuple[str, ...]:
        """Start what should run and does not; the problems that were met."""
        problems = []
        for each in self.noted():
            async with self._turn:
                try:
                    # Limits told to a daemon with clients bind none of these: `mend` ends them.
                    unmade = each.half_made and each.static
                    if unmade or not await self._control(each).answers():
                        notes.write(self._root, replace(each, sm_partitions=(), limited=False))
                        names = await self._control(each).share(each.limits)
                        told = replace(each, sm_partitions=names, limited=True)
                        notes.write(self._root, told)
                except MpsError as error:
                    problems.append(f"{each.name} has no MPS daemon: {error}")
        return tuple(problems)

    async def mend(self, workers: Workers, end_worker: EndWorker) -> Mended:
        """Look at every place, and mend what is wrong with it; see `Mending.look`."""
        found = []
        self._sightings.keep({each.name for each in self.noted()})
        for noted in self.noted():
            async with self._turn:
                # It may be another one, or none, by the time of this turn.
                each = next((one for one in self.noted() if one == noted), None)
                if each is None:
                    continue
                mps = self._control(each)
                try:
                    found.append(await self._mending.look(each, mps, workers, end_worker))
                except MpsError as error:
                    found.append(Mended(problems=(f"{each.name}: {error}",)))
        return Mended(
            tuple(name for each in found for name in each.places),
            tuple(problem for each in found for problem in each.problems),
        )

    def seen(self) -> tuple[SeenPlace, ...]:
        """What was seen of each place when it was last looked after; asks no daemon."""
        return self._sightings.latest()

    async def stop(self) -> None:
        """End every daemon; the notes stay, and `restore` starts them again.

        One that cannot be ended keeps none of the others.
        """
        for each in self._notes():
            async with self._turn:
                try:
                    await self._control(each).stop()
                except MpsError as error:
                    log.error("the MPS daemon of %s is left behind: %s", each.name, error)

    def _notes(self) -> tuple[SharedPlace, ...]:
        return notes.read(self._root, self._boot_id)

    def _control(self, shared: SharedPlace) -> MpsControl:
        directory = shared.directory(self._root)
        return control(shared.language, self._programs.control, directory, shared.device)


def _described(
    gpu: Gpu,
    place: Instance | None,
    shares: tuple[Share, ...],
    language: Language,
    boot_id: str,
) -> SharedPlace:
    """A place with what its GPU says of it."""
    name = f"gpu{gpu.index}" if place is None else f"gpu{gpu.index}/{place}"
    device, memory_bytes, sm_count = gpu.uuid, gpu.usable_bytes, gpu.sm_count
    if place is not None:
        found = next((each for each in gpu.instances or () if each.place == place), None)
        if found is None or not found.uuid:
            raise MpsShareError(f"{name} is not there, so it cannot be shared: plan again")
        device, memory_bytes, sm_count = found.uuid, found.memory_bytes, found.sm_count
    return SharedPlace(
        name, gpu.uuid, place, device, memory_bytes, sm_count, language, shares, boot_id
    )
