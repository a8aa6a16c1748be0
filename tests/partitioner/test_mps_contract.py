"""What every MPS control daemon must do for us: the simulated one, and the driver's where it is.

On a GPU it has directories of its own, two tiny clients, and leaves modes and settings as they are.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from partitioner.errors import MpsError, MpsTimeoutError, MpsUnavailableError, NvmlError
from partitioner.mps.commands import REAL_CONTROL, Commands
from partitioner.mps.control import Language, Limits, MpsControl, ServerStatus
from partitioner.mps.lifetime import PID_FILE
from partitioner.mps.probing import control as control_of
from partitioner.mps.probing import language_of
from partitioner.nvml import PynvmlReader

pytestmark = pytest.mark.timeout(300)
GIB = 1 << 30
STAND_IN = (sys.executable, "-m", "partitioner.simulated.mps_control")
CLIENT = (sys.executable, "-m", "partitioner.simulated.mps_client")
PROBE = (sys.executable, "-m", "swap.share_probe")
DEVICE = "GPU-5a1b6a3e-0000-4000-8000-0000000000aa"
SMALL, LARGE = Limits(GIB, 25), Limits(2 * GIB, 50)


@dataclass
class Bench:
    """A daemon under test, and what stands on it."""

    control: MpsControl
    client: tuple[str, ...]
    multiprocessors: int
    memory_bytes: int
    root: Path
    program: tuple[str, ...] = STAND_IN

    async def begin(self, number: int, limits: Limits) -> tuple[asyncio.subprocess.Process, dict]:
        """A client of a share, with what it says that it sees."""
        variables = self.control.environment(number, limits)
        process = await asyncio.create_subprocess_exec(
            *("env", *(f"{name}={value}" for name, value in variables.items())),
            *(*self.client, "--multiprocessors", str(self.multiprocessors)),
            *("--memory-bytes", str(self.memory_bytes), "--limit-bytes", str(limits.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        assert line.startswith(b"{"), line + await process.stdout.read()
        return process, json.loads(line)


async def end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


def real(language: Language, root: Path) -> Bench:
    """The driver's own program on the first GPU that is not in MIG mode."""
    if shutil.which(*REAL_CONTROL) is None:
        pytest.skip("this host has no nvidia-cuda-mps-control")
    if language is Language.NAMED and asyncio.run(language_of(REAL_CONTROL, root)) != language:
        pytest.skip("this driver's control program knows no namespaces")
    try:
        gpus = PynvmlReader().discover()
    except NvmlError as error:
        pytest.skip(str(error))
    gpu = next((each for each in gpus if not each.mig_enabled), None)
    if gpu is None:
        pytest.skip("every GPU is in MIG mode")
    control = control_of(language, REAL_CONTROL, root, gpu.uuid)
    return Bench(control, PROBE, gpu.sm_count, gpu.usable_bytes, root, REAL_CONTROL)


@pytest.fixture(
    params=[
        *("legacy", "named"),
        *(pytest.param(each, marks=pytest.mark.gpu) for each in ("real legacy", "real named")),
    ]
)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    language = Language.NAMED if request.param.endswith("named") else Language.LEGACY
    if request.param.startswith("real"):
        return real(language, tmp_path)
    return Bench(control_of(language, STAND_IN, tmp_path, DEVICE), CLIENT, 132, 141 * GIB, tmp_path)


@pytest.fixture
def play(bench: Bench) -> Iterator[Callable[[Callable[[], Awaitable[None]]], None]]:
    """Plays a scenario; the daemon is stopped afterwards, whatever came."""

    def run(scenario: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            try:
                async with asyncio.timeout(240):
                    await scenario()
            finally:
                await bench.control.stop()

        asyncio.run(bounded())

    return run


def test_nothing_answers_before_the_start_and_after_the_end(bench: Bench, play: Callable) -> None:
    async def scenario() -> None:
        control = bench.control
        assert not await control.answers()
        await control.stop()
        await control.share((SMALL,))
        assert await control.answers()
        daemon = psutil.Process(int((control.pipe_directory / PID_FILE).read_text()))
        await control.stop()
        assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE
        assert not await control.answers()

    play(scenario)


def test_limits_are_read_back_and_may_be_changed_under_a_server(
    bench: Bench, play: Callable
) -> None:
    async def scenario() -> None:
        control = bench.control
        await control.share((SMALL, LARGE))
        (server,) = await control.servers()
        assert server.status is ServerStatus.ACTIVE
        first, second = await control.limits(2)
        assert second == LARGE
        # Without shares of its own the daemon has the loosest, and clients tighten.
        assert first == (SMALL if control.language is Language.NAMED else LARGE)
        await control.share((SMALL, LARGE, Limits(5 * GIB, 90)))
        assert (await control.limits(3))[2] == Limits(5 * GIB, 90)
        await control.share((SMALL,))
        assert await control.limits(1) == (SMALL,)
        assert await control.servers() == (server,)

    play(scenario)


def test_two_clients_have_each_its_share_and_no_more(bench: Bench, play: Callable) -> None:
    async def scenario() -> None:
        control = bench.control
        await control.share((SMALL, LARGE))
        one, sees_one = await bench.begin(0, SMALL)
        two, sees_two = await bench.begin(1, LARGE)
        for sees, limits in ((sees_one, SMALL), (sees_two, LARGE)):
            assert 0 < sees["memory_bytes"] <= limits.memory_bytes
            most = bench.multiprocessors * limits.thread_percent // 100
            assert 0 < sees["multiprocessors"] <= most
        assert await control.clients() == tuple(sorted((one.pid, two.pid)))
        await control.terminate(one.pid)
        assert await control.clients() == (two.pid,)
        assert psutil.Process(one.pid).is_running(), "terminated is not ended"
        await end(one)
        await end(two)
        while await control.clients():  # noqa: ASYNC110 (its daemon hears of it by and by)
            await asyncio.sleep(0.01)

    play(scenario)


def test_a_device_that_is_not_there_is_noticed(bench: Bench, play: Callable) -> None:
    async def scenario() -> None:
        other = control_of(bench.control.language, bench.program, bench.root, "GPU-unheard-of")
        await bench.control.share((SMALL,))  # The running daemon is of another device.
        if bench.control.language is Language.NAMED:
            await Commands(bench.program, bench.root, {}).ask("server", "delete", "hotbay")
        with pytest.raises(MpsError, match="GPU-unheard-of"):
            await other.share((SMALL,))

    play(scenario)


def test_the_language_is_asked_of_the_program(tmp_path: Path) -> None:
    async def scenario() -> None:
        assert await language_of(STAND_IN, tmp_path) is Language.NAMED
        assert await language_of((*STAND_IN, "--newest", "2"), tmp_path) is Language.LEGACY
        with pytest.raises(MpsUnavailableError, match="nvidia-compute-utils"):
            await language_of(("/nowhere/mps-control",), tmp_path)

    asyncio.run(scenario())


def test_a_program_that_is_stuck_is_given_up_and_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        stuck = Commands(("sleep",), tmp_path, {}, timeout_s=0.2)
        with pytest.raises(MpsTimeoutError, match="3600"):
            await stuck.ask("3600")
        assert not [each for each in psutil.Process().children() if "sleep" in each.cmdline()]

    asyncio.run(scenario())
