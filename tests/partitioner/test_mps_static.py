"""Shares with multiprocessors to themselves: words, the stand-in's rules, places with real daemons.

On a GPU whose driver has them the last test does the same with the driver's own program.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from partitioner.errors import (
    MpsAnswerError,
    MpsLimitError,
    MpsShareError,
    MpsUnavailableError,
    NvmlError,
)
from partitioner.gpu import Gpu
from partitioner.layout import Share
from partitioner.mps import static
from partitioner.mps.commands import REAL_CONTROL, Commands
from partitioner.mps.control import Limits
from partitioner.mps.legacy import LegacyControl
from partitioner.mps.mending import Mended
from partitioner.mps.places import MpsPlaces, Programs
from partitioner.mps.preflight import Sight, unlike
from partitioner.mps.static import Listed
from partitioner.nvml import PynvmlReader
from partitioner.partition import PartitionKind, partitions_of
from partitioner.simulated.mps_chunks import INVALID, Chunks
from partitioner.simulated.mps_state import DEFAULT, MpsState, SharedLimits
from partitioner.simulated.mps_texts import FAULT_COMMAND, legacy
from tests.partitioner.test_mps_contract import DEVICE, PROBE
from tests.partitioner.test_mps_places import GIB, GPU, HALF, NOTE, play, programs

pytestmark = pytest.mark.timeout(300)
WIDE, NARROW = Share(60 * GIB, None, "team-a", 96), Share(60 * GIB, None, "", 32)
SIZES = ("--multiprocessors", f"{DEVICE}=132/8")


async def seen_by(places: MpsPlaces, partition: str) -> str:
    """What a client of a share prints of its multiprocessors, or why it is refused."""
    words = [word for word in places.prefix(partition) if word != "--"]
    process = await asyncio.create_subprocess_exec(
        *words, "--multiprocessors", "132", "--memory-bytes", str(141 * GIB),
        stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    told, _ = await process.communicate()
    return told.decode()


@pytest.mark.parametrize(
    ("capability", "chunk"),
    [((7, 0), 0), ((7, 5), 0), ((8, 0), 4), ((8, 9), 4), ((9, 0), 8), ((10, 0), 8), ((12, 0), 8)],
)
def test_chunks_by_architecture(capability: tuple[int, int], chunk: int) -> None:
    assert static.chunk_of(capability) == chunk


def test_answers_are_read_in_every_form_that_is_known() -> None:
    uuid = "GPU-74d43ed3-cdf7-e667-3644-bf5b4f46ed65"
    name = f"{uuid}/Dx4AAAAAAAAAAAAAAAA"
    for told in (f"Partition {name} created\n", f"{name}\n"):
        assert static.parse_added(told, uuid) == name
    failed = f"Failed to fulfill the requested SM partition of 17 chunks, error {INVALID}"
    for told in (failed, "", "GPU-other/Dx4A"):
        with pytest.raises(MpsLimitError, match="threads"):
            static.parse_added(told, uuid)
    assert static.remove_command(name) == f"sm_partition rm {uuid} Dx4AAAAAAAAAAAAAAAA"
    table = (
        "GPU           Partition   free   used   free  used  clients\n"
        "                          chunk  chunk  SM    SM\n"
        "GPU-74d43ed3  -           9      7      76    56    -\n"
        "GPU-74d43ed3  Dx4AAA...   -      7      -     56    Yes\n"
    )
    listed = static.parse_listed(table)
    assert listed == (Listed("Dx4AAA", 56),)
    assert static.sm_count_of(name, listed) == 56
    assert static.sm_count_of(f"{uuid}/Ex4AAA", listed) == 0
    with pytest.raises(MpsAnswerError):
        static.parse_listed(table.replace("56    Yes", "?     Yes"))
    versions = [static.version_of(told) for told in ("13010", "MPS version 13020, v2", "", "3.1")]
    assert versions == [13010, 13020, 0, 0]


def test_the_stand_in_gives_each_chunk_once_and_none_under_clients() -> None:
    state = MpsState(DEVICE, 48, 700, Chunks(DEVICE, 132, 8))
    state.start_server("s", 0, DEVICE)

    def said(line: str) -> str:
        told, code = legacy(state, line)
        assert code == 0, "it says so and ends well, as the real one does"
        return told

    def add(chunks: int, device: str = DEVICE) -> str:
        return said(f"sm_partition add {device} {chunks}")

    refused = [add(17), add(0), add(1, "GPU-other")]
    assert all(told.startswith("Failed to fulfill") for told in refused)
    name = static.parse_added(add(12), DEVICE)
    assert "Failed" in add(5), "four chunks are left, and four multiprocessors of none"
    assert static.sm_count_of(name, static.parse_listed(said("lspart"))) == 96
    assert " - 4 12 36 96 -" in said("lspart")
    assert state.connect(1, "s", DEFAULT, {}, 10.0) == INVALID
    assert state.connect(1, "s", DEFAULT, {}, 10.0, f"{DEVICE}/unheard") == INVALID
    granted = state.connect(1, "s", DEFAULT, {}, 10.0, name)
    assert granted == SharedLimits(None, 100.0, 96), "a percentage says nothing there"
    assert "Failed" in add(1)
    assert "Failed" in said(static.remove_command(name))
    state.gone(1)
    assert said(static.remove_command(name)).strip() == ""
    assert " - 16 0 132 0 -" in said("lspart")
    assert legacy(MpsState(DEVICE, 48, 700), "lspart")[1] == 1, "not without the flag"


def test_a_program_that_fails_instead_of_saying_so_is_understood(tmp_path: Path) -> None:
    control = LegacyControl(("false",), tmp_path, DEVICE)
    with pytest.raises(MpsLimitError, match="gives no partition"):
        asyncio.run(control._added(1))


@pytest.mark.parametrize(("multiprocessors", "well"), [(96, True), (88, False), (132, False)])
def test_a_sight_must_be_exact(multiprocessors: int, well: bool) -> None:
    problem = unlike(NOTE, Limits(60 * GIB, 100, 96), Sight(multiprocessors, GIB))
    assert (problem == "") is well
    assert well or "instead of the 96" in problem


def test_shares_have_their_own_multiprocessors_and_nobody_comes_in_without(tmp_path: Path) -> None:
    places = MpsPlaces(tmp_path, programs(*SIZES), "boot")

    async def scenario() -> None:
        await places.refuse_missing([WIDE])
        await places.share(GPU, None, (WIDE, NARROW))
        (noted,) = places.noted()
        assert noted.static
        assert len(set(noted.sm_partitions)) == 2
        assert '"multiprocessors": 96' in await seen_by(places, "gpu0/mps0")
        assert '"multiprocessors": 32' in await seen_by(places, "gpu0/mps1")
        words = " ".join(places.prefix("gpu0/mps1"))
        assert f"{static.VARIABLE}={noted.sm_partitions[1]}" in words
        assert "PERCENTAGE" not in words
        pids = places.pids()
        await places.share(GPU, None, (replace(WIDE, owner="team-b"), NARROW))
        assert places.pids() == pids, "the owner alone is another"
        assert places.noted()[0].shares[0].owner == "team-b"
        await places.share(GPU, None, (NARROW, NARROW, NARROW))
        assert '"multiprocessors": 32' in await seen_by(places, "gpu0/mps2")
        # A place that had them can be shared in the other way again.
        await places.share(GPU, None, (HALF, HALF))
        assert places.noted()[0].sm_partitions == ()
        assert '"multiprocessors": 66' in await seen_by(places, "gpu0/mps1")

    play(places, scenario)


def test_a_new_daemon_gives_new_partitions_which_the_note_knows(tmp_path: Path) -> None:
    places = MpsPlaces(tmp_path, programs(*SIZES, "--newest", "2"), "boot")
    ended: list[str] = []

    async def end(partition: str) -> None:
        ended.append(partition)

    async def scenario() -> None:
        await places.share(GPU, None, (WIDE, NARROW))
        for pid in places.pids():
            psutil.Process(pid).kill()
        assert await places.restore() == ()
        assert '"multiprocessors": 96' in await seen_by(places, "gpu0/mps0")
        client = await asyncio.create_subprocess_exec(
            *places.prefix("gpu0/mps0"), "sh", "-c", "echo here; exec sleep 600",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None
        assert await client.stdout.readline() == b"here\n"
        commands = Commands(places._programs.control, tmp_path / "gpu0", {})
        await commands.ask(text=FAULT_COMMAND)
        before = places.pids()
        assert await places.mend(lambda: {"gpu0/mps0": client.pid}, end) == Mended(("gpu0",))
        assert ended == ["gpu0/mps0"]
        assert not places.pids() & before
        assert '"multiprocessors": 96' in await seen_by(places, "gpu0/mps0")
        client.kill()
        await client.wait()

    play(places, scenario)


@pytest.mark.parametrize(
    ("sizes", "share", "problem"),
    [
        ("132/8", replace(WIDE, sm_count=60), "8 at a time, and 60"),
        ("64/8", WIDE, "gives no partition.*INVALID_RESOURCE"),
        ("4/8", NARROW, "gives no partition.*INVALID_RESOURCE"),
    ],
)
def test_what_a_driver_does_not_give_is_told_and_leaves_nothing_ready(
    tmp_path: Path, sizes: str, share: Share, problem: str
) -> None:
    places = MpsPlaces(tmp_path, programs("--multiprocessors", f"{DEVICE}={sizes}"), "boot")

    async def scenario() -> None:
        with pytest.raises(MpsLimitError, match=problem):
            await places.share(GPU, None, (share,))
        assert places.noted() == ()
        assert await places.shared(DEVICE) == {None: ()}
        await places.unshare(DEVICE, None)
        assert places.pids() == frozenset()

    play(places, scenario)


def test_an_older_program_is_refused_by_its_version(tmp_path: Path) -> None:
    places = MpsPlaces(tmp_path, programs("--version", "13000", *SIZES), "boot")

    async def scenario() -> None:
        await places.refuse_missing([HALF])
        with pytest.raises(MpsUnavailableError, match=r"13010.*driver 590.*is 13000"):
            await places.refuse_missing([WIDE])

    play(places, scenario)


def test_a_partition_tells_its_own_multiprocessors() -> None:
    gpu = Gpu(DEVICE, 0, memory_bytes=141 * GIB, sm_count=132)
    shared = replace(NOTE, shares=(WIDE, NARROW), sm_partitions=("a", "b"))
    parts = partitions_of([gpu], (), "boot", (shared,))
    assert [each.kind for each in parts] == [PartitionKind.MPS] * 2
    assert [(each.sm_count, each.thread_percent) for each in parts] == [(96, 72), (32, 24)]


@pytest.mark.gpu
def test_the_drivers_own_program_does_the_same(tmp_path: Path) -> None:
    if shutil.which(*REAL_CONTROL) is None:
        pytest.skip("this host has no nvidia-cuda-mps-control")
    try:
        gpus = PynvmlReader().discover()
    except NvmlError as error:
        pytest.skip(str(error))
    gpu = next((each for each in gpus if not each.mig_enabled), None)
    if gpu is None or not static.chunk_of(gpu.compute_capability):
        pytest.skip("no GPU gives multiprocessors away")
    places = MpsPlaces(tmp_path, Programs(look=PROBE), "boot")
    chunk = static.chunk_of(gpu.compute_capability)
    shares = tuple(Share(2 * GIB, None, "", count * chunk) for count in (1, 3))

    async def scenario() -> None:
        try:
            await places.refuse_missing([WIDE])
        except MpsUnavailableError as error:
            pytest.skip(str(error))
        try:
            await places.share(gpu, None, shares)
        except MpsShareError as error:
            pytest.fail(str(error))
        assert len(set(places.noted()[0].sm_partitions)) == 2

    play(places, scenario)
