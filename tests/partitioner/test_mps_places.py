"""Shared places with real daemons: ceilings, notes, what is mended and what is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from partitioner.errors import MpsCommandError, MpsShareError
from partitioner.gpu import Gpu
from partitioner.layout import Share
from partitioner.mps import shared as notes
from partitioner.mps.control import Language, Limits
from partitioner.mps.mending import ASTRAY_ENDS_MAX, Mended
from partitioner.mps.places import MpsPlaces, Programs
from partitioner.mps.preflight import Sight, unlike
from partitioner.mps.shared import SharedPlace
from tests.partitioner.test_mps_contract import CLIENT, DEVICE, STAND_IN

pytestmark = pytest.mark.timeout(300)
GIB = 1 << 30
GPU = Gpu(DEVICE, 0, memory_bytes=141 * GIB, sm_count=132)
HALF = Share(60 * GIB, 50)
NOTE = SharedPlace(
    "gpu0", DEVICE, None, DEVICE, 141 * GIB, 132, Language.LEGACY, (HALF, Share()), "boot", True
)


def programs(*options: str) -> Programs:
    return Programs(look=CLIENT, control=(*STAND_IN, *options), prefix=(*CLIENT, "--"))


def play(places: MpsPlaces, scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        try:
            async with asyncio.timeout(240):
                await scenario()
        finally:
            await places.stop()

    asyncio.run(run())


def test_more_shares_than_a_server_takes_clients_are_noticed_before_anybody_serves(
    tmp_path: Path,
) -> None:
    places = MpsPlaces(tmp_path, programs("--newest", "2", "--clients-max", "1"), "boot")

    async def scenario() -> None:
        with pytest.raises(MpsShareError, match=r"mps[01].*MAX_CLIENTS_REACHED"):
            await places.share(GPU, None, (HALF, HALF))
        assert await places.shared(DEVICE) == {None: ()}, "half done, and told to be so"
        assert places.noted() == ()
        await places.unshare(DEVICE, None)
        assert (await places.shared(DEVICE), places.pids()) == ({}, frozenset())
        await places.share(GPU, None, (HALF,))
        assert await places.shared(DEVICE) == {None: (HALF,)}
        # Another boot's note is none, whatever the directory holds.
        assert MpsPlaces(tmp_path, programs(), "another").noted() == ()

    play(places, scenario)


def test_clients_without_limits_are_ended_whatever_else_is_done_to_their_place_first(
    tmp_path: Path,
) -> None:
    """Neither a restart nor a change of the shares counts them as limited."""
    places = MpsPlaces(tmp_path, programs("--newest", "2"), "boot")
    ended: list[str] = []

    async def end(name: str) -> None:
        ended.append(name)

    async def scenario() -> None:
        await places.share(GPU, None, (HALF,))
        (noted,) = places.noted()
        notes.write(tmp_path, replace(noted, limited=False))
        assert await places.restore() == ()
        await places.share(GPU, None, (HALF, HALF))
        (noted,) = places.noted()
        assert noted.half_made
        workers = dict.fromkeys(noted.partitions, 1)
        assert await places.mend(lambda: workers, end) == Mended(("gpu0",))
        assert ended == list(noted.partitions)
        (noted,) = places.noted()
        assert not noted.half_made

    play(places, scenario)


def test_a_newer_driver_gives_each_share_a_namespace(tmp_path: Path) -> None:
    places = MpsPlaces(tmp_path, programs(), "boot")

    async def scenario() -> None:
        await places.share(GPU, None, (HALF, Share()))
        words = " ".join(places.prefix("gpu0/mps1"))
        assert words.startswith(f"env CUDA_MPS_PIPE_DIRECTORY={tmp_path}/gpu0/pipe/hotbay/mps1 ")
        assert "MEM_LIMIT" not in words, "the namespace limits, and nothing can take that away"
        assert words.endswith("mps_client --")
        assert places.prefix("gpu1/mps0") == places.prefix("gpu0") == ()
        (noted,) = places.noted()
        assert noted.language is Language.NAMED

    play(places, scenario)


def test_workers_that_run_beside_mps_are_ended_a_few_times_and_then_only_told(
    tmp_path: Path,
) -> None:
    places = MpsPlaces(tmp_path, programs("--newest", "2"), "boot")

    async def scenario() -> None:
        await places.share(GPU, None, (HALF, HALF))
        ended: list[str] = []

        async def end(name: str) -> None:
            ended.append(name)

        assert await places.mend(dict, end) == Mended()
        client = await asyncio.create_subprocess_exec(*places.prefix("gpu0/mps0"), "sleep", "600")
        control = places._control(places.noted()[0])
        while await control.clients() != (client.pid,):  # noqa: ASYNC110 (it is on its way)
            await asyncio.sleep(0.01)
        await places.release("gpu0/mps0", client.pid)
        await places.release("gpu1", client.pid)
        assert (await control.clients(), client.returncode) == ((), None)
        client.kill()
        await client.wait()
        beside = {"gpu0/mps1": 1}
        told = [await places.mend(lambda: beside, end) for _ in range(ASTRAY_ENDS_MAX + 2)]
        assert ended == ["gpu0/mps1"] * ASTRAY_ENDS_MAX
        *ends, last, after = told
        assert ends == [Mended(("gpu0/mps1",))] * ASTRAY_ENDS_MAX
        assert last.places == ()
        assert "gpu0/mps1 has no limits" in last.problems[0]
        assert after == Mended()
        for pid in places.pids():
            psutil.Process(pid).kill()
        assert await places.shared(DEVICE) == {None: ()}
        assert await places.restore() == ()
        assert await places.shared(DEVICE) == {None: (HALF, HALF)}

    play(places, scenario)


@pytest.mark.parametrize(
    ("sight", "problem"),
    [
        (Sight(66, 60 * GIB), ""),
        (Sight(64, 59 * GIB), ""),
        (Sight(132, 60 * GIB), "132 multiprocessors"),
        (Sight(66, 61 * GIB), "bytes instead of"),
        (Sight(0, GIB), "0 multiprocessors"),
        ("CUDA_ERROR_MPS_SERVER_NOT_READY", "SERVER_NOT_READY"),
        ("", "said nothing"),
    ],
)
def test_a_sight_is_judged(sight: Sight | str, problem: str) -> None:
    said = unlike(NOTE, Limits(60 * GIB, 50), sight)
    assert bool(said) == bool(problem)
    assert problem in said


def test_notes_survive_and_damaged_ones_are_none(tmp_path: Path) -> None:
    notes.write(tmp_path, NOTE)
    other = replace(NOTE, name="gpu1", boot_id="before")
    notes.write(tmp_path, other)
    assert notes.read(tmp_path, "boot") == (NOTE,)
    assert NOTE.limits == (Limits(60 * GIB, 50), Limits(141 * GIB, 100))
    (NOTE.directory(tmp_path) / notes.NOTE_NAME).write_text('{"name": "gpu0"')
    assert notes.read(tmp_path, "boot") == ()


def test_a_path_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    places = MpsPlaces(tmp_path / ("x" * 90), programs("--newest", "2"), "boot")

    async def scenario() -> None:
        with pytest.raises(MpsCommandError, match="--runtime-dir"):
            await places.share(GPU, None, (HALF,))

    play(places, scenario)
