"""What a look at a place concludes, over a scripted control daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from partitioner.errors import (
    MpsAnswerError,
    MpsCommandError,
    MpsError,
    MpsLimitError,
    MpsTimeoutError,
    MpsUnavailableError,
)
from partitioner.layout import Share
from partitioner.mps import shared as notes
from partitioner.mps.control import Language, Limits, MpsServer, ServerStatus
from partitioner.mps.mending import ASTRAY_ENDS_MAX, SILENT_LOOKS_MAX, Mended, Mending
from partitioner.mps.places import MpsPlaces, Programs
from partitioner.mps.recovery import faulted
from partitioner.mps.shared import SharedPlace
from partitioner.mps.sightings import Sightings

GIB = 1 << 30
PLACE = SharedPlace(
    "gpu0",
    "GPU-a",
    None,
    "GPU-a",
    141 * GIB,
    132,
    Language.LEGACY,
    (Share(), Share()),
    "boot",
    True,
)
ONE, TWO = PLACE.partitions


class Daemon:
    """A control daemon that does as it is told, and its clients' workers."""

    language = Language.LEGACY
    pipe_directory = Path("/nowhere/pipe")

    def __init__(self, workers: dict[str, int]) -> None:
        self.workers = workers
        self.clients_now = set(workers.values())
        self.silent: MpsError | None = None
        """What every question is answered by."""
        self.unstoppable: MpsError | None = None
        self.status = ServerStatus.ACTIVE
        self.said: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """Happens before the answer to who its clients are."""

    async def answers(self) -> bool:
        return self.silent is None

    async def servers(self) -> tuple[MpsServer, ...]:
        if self.silent is not None:
            raise self.silent
        return (MpsServer(500, self.status),)

    async def clients(self) -> tuple[int, ...]:
        if self.silent is not None:
            raise self.silent
        answer = tuple(sorted(self.clients_now))
        self.meanwhile()
        return answer

    async def limits(self, count: int) -> tuple[Limits, ...]:
        return PLACE.limits[:count]

    async def terminate(self, pid: int) -> None:
        self.said.append(f"terminate {pid}")
        self.clients_now.discard(pid)
        if not self.clients_now:
            self.status = ServerStatus.ACTIVE

    async def stop(self) -> None:
        self.said.append("stop")
        if self.unstoppable is not None:
            raise self.unstoppable

    async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
        self.said.append("share")
        self.silent = None
        return ()

    def environment(self, number: int, limits: Limits) -> dict[str, str]:
        return {}

    async def end(self, name: str) -> None:
        self.said.append(f"end {name}")
        self.workers[name] += 100
        self.clients_now.add(self.workers[name])


def play(scenario: Callable[[Daemon, Callable[[], Awaitable[Mended]]], Awaitable[None]]) -> None:
    async def run() -> None:
        daemon = Daemon({ONE: 1, TWO: 2})
        mending = Mending(Sightings(), lambda shared: daemon.said.append(f"note {shared.name}"))

        async def look() -> Mended:
            return await mending.look(PLACE, daemon, lambda: daemon.workers, daemon.end)

        async with asyncio.timeout(120):
            await scenario(daemon, look)

    asyncio.run(run())


def test_only_a_daemon_that_is_not_there_is_gone() -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        assert not await faulted(daemon)
        daemon.silent = MpsCommandError("cannot find it")
        assert await faulted(daemon)
        for error in (MpsTimeoutError, MpsAnswerError, MpsUnavailableError):
            daemon.silent = error("perhaps")
            with pytest.raises(error):
                await faulted(daemon)

    play(scenario)


def test_a_fault_ends_all_and_what_is_sound_nobody() -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        assert await look() == Mended()
        assert daemon.said == []
        daemon.status = ServerStatus.FAULT
        assert await look() == Mended(("gpu0",))
        taken = ["terminate 1", "terminate 2"]
        ended = [f"end {ONE}", f"end {TWO}"]
        assert daemon.said == ["note gpu0", *taken, *ended, "share", "note gpu0"]

    play(scenario)


def test_nobody_comes_in_while_multiprocessors_are_given_out_anew() -> None:
    """And where that failed, the next look does it again."""
    static = replace(PLACE, shares=(Share(sm_count=96), Share(sm_count=32)))
    noted = [replace(static, sm_partitions=("a", "b"))]

    class Refusing(Daemon):
        refuses = True

        async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
            await super().share(limits)
            assert noted[-1].sm_partitions == ()
            if self.refuses:
                raise MpsLimitError("not under clients")
            return ("c", "d")

    async def run() -> None:
        daemon = Refusing({ONE: 1, TWO: 2})
        mending = Mending(Sightings(), noted.append)

        async def look() -> Mended:
            return await mending.look(noted[-1], daemon, lambda: daemon.workers, daemon.end)

        assert await look() == Mended()
        daemon.status = ServerStatus.FAULT
        for _ in range(2):
            with pytest.raises(MpsLimitError):
                await look()
            assert noted[-1].half_made
        daemon.refuses = False
        assert await look() == Mended(("gpu0",))
        assert noted[-1].sm_partitions == ("c", "d")
        assert await look() == Mended()

    asyncio.run(run())


def test_limits_that_could_not_be_told_are_told_at_a_later_look() -> None:
    """Whoever came in meanwhile has none, and is ended once: when they are told."""
    noted = [PLACE]

    class Forgetful(Daemon):
        refuses = True

        async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
            await super().share(limits)
            if self.refuses:
                raise MpsLimitError("it keeps others")
            return ()

    async def run() -> None:
        daemon = Forgetful({ONE: 1, TWO: 2})
        mending = Mending(Sightings(), noted.append)

        async def look() -> Mended:
            daemon.said.clear()
            return await mending.look(noted[-1], daemon, lambda: daemon.workers, daemon.end)

        daemon.silent = MpsCommandError("cannot find it")
        for ends in (True, False, False):
            with pytest.raises(MpsLimitError):
                await look()
            assert noted[-1].half_made
            assert (f"end {ONE}" in daemon.said) == ends
        daemon.refuses = False
        assert await look() == Mended(("gpu0",))
        assert daemon.said == ["share", f"end {ONE}", f"end {TWO}"]
        assert not noted[-1].half_made
        assert await look() == Mended()

    asyncio.run(run())


def test_a_daemon_that_gives_no_answer_is_replaced_only_after_several_looks() -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        for _ in range(2):
            daemon.silent = MpsTimeoutError("not within 15 s")
            for _ in range(SILENT_LOOKS_MAX - 1):
                assert await look() == Mended()
            daemon.silent = None
            assert await look() == Mended(), "it has answered: all is forgotten"
        assert daemon.said == [], "nobody was ended"
        daemon.silent = MpsTimeoutError("not within 15 s")
        found = [await look() for _ in range(SILENT_LOOKS_MAX)]
        assert found[-1] == Mended(("gpu0",))
        # It would be in a new one's way.
        ended = [f"end {ONE}", f"end {TWO}"]
        assert daemon.said == ["note gpu0", *ended, "stop", "share", "note gpu0"]

    play(scenario)


@pytest.mark.parametrize("error", [MpsAnswerError, MpsUnavailableError])
def test_what_is_not_understood_is_told_and_ends_nobody(error: type[MpsError]) -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        daemon.silent = error("strange")
        for _ in range(SILENT_LOOKS_MAX):
            with pytest.raises(error):
                await look()
        assert daemon.said == []

    play(scenario)


def test_who_was_a_client_since_is_not_held_to_what_was_before() -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        for _ in range(2 * ASTRAY_ENDS_MAX):
            daemon.clients_now.discard(daemon.workers[ONE])
            assert await look() == Mended((ONE,)), "and its successor is a client"
            assert await look() == Mended()
        assert daemon.said == [f"end {ONE}"] * 2 * ASTRAY_ENDS_MAX

    play(scenario)


def test_a_worker_that_starts_again_meanwhile_is_not_judged() -> None:
    async def scenario(daemon: Daemon, look: Callable[[], Awaitable[Mended]]) -> None:
        def restarted() -> None:
            """The one that the daemon told has ended, and its successor is connected."""
            daemon.workers[ONE] = 11

        def ended() -> None:
            """It is no client any more, since it is gone."""
            del daemon.workers[TWO]

        daemon.meanwhile = restarted
        assert await look() == Mended()
        daemon.meanwhile = ended
        daemon.clients_now = {11}
        assert await look() == Mended()
        assert daemon.said == []

    play(scenario)


class Scripted(MpsPlaces):
    """Places whose daemons are scripted, by name."""

    def __init__(self, root: Path, daemons: dict[str, Daemon]) -> None:
        super().__init__(root, Programs(look=()), "boot")
        self.daemons = daemons
        for name in daemons:
            place = SharedPlace(
                name, f"GPU-{name}", None, f"GPU-{name}", GIB, 1, Language.LEGACY, (Share(),),
                "boot", True,
            )  # fmt: skip
            notes.write(root, place)

    def _control(self, shared: SharedPlace) -> Daemon:
        return self.daemons[shared.name]


def test_one_place_that_cannot_be_mended_or_stopped_keeps_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers = {"gpu0/mps0": 1, "gpu1/mps0": 2}
    daemons = {name: Daemon(workers) for name in ("gpu0", "gpu1")}
    daemons["gpu0"].silent = MpsAnswerError("it tells limits as 'many'")
    daemons["gpu0"].unstoppable = MpsUnavailableError("no such program")
    daemons["gpu1"].status = ServerStatus.FAULT
    places = Scripted(tmp_path, daemons)

    async def scenario() -> None:
        found = await places.mend(lambda: workers, daemons["gpu1"].end)
        assert found == Mended(("gpu1",), ("gpu0: it tells limits as 'many'",))
        await places.stop()

    asyncio.run(scenario())
    assert [each.said[-1] for each in daemons.values()] == ["stop", "stop"]
    assert [each.shared.name for each in places.seen()] == ["gpu1"]
    assert "gpu0 is left behind: no such program" in caplog.text
