"""Starting, waiting for and ending a control daemon, whatever language it speaks.

It owns the waits and their limits. It ends by signal only a process that is provably the daemon of
these directories. The invariants: a daemon that was told to start answers when `started` returns;
after `ended` no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import psutil

from partitioner.errors import MpsCommandError, MpsError, MpsTimeoutError, MpsUnavailableError
from partitioner.mps.commands import Commands

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.05
PID_FILE = "nvidia-cuda-mps-control.pid"

Question = Callable[[], Awaitable[bool]]


async def answered(question: Callable[[], Awaitable[object]]) -> bool:
    """Whether a command succeeds; without a daemon the program says that it finds none."""
    try:
        await question()
    except MpsUnavailableError:
        raise
    except MpsError:
        return False
    return True


async def until(true: Question, what: str, timeout_s: float) -> None:
    """Wait until it is so. Raises `MpsTimeoutError`."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await true():  # noqa: ASYNC110 (another program; there is no event)
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise MpsTimeoutError(f"{what} within {timeout_s:g} s") from None


async def started(commands: Commands, answers: Question, *arguments: str) -> None:
    """Put a daemon in the background and wait until it answers."""
    await commands.launch("-d", *arguments)
    where = commands.pipe_directory
    await until(answers, f"the MPS control daemon of {where} did not answer", START_TIMEOUT_S)


async def ended(commands: Commands, quit_daemon: Callable[[], Awaitable[object]]) -> None:
    """Ask the daemon to quit, and wait for its end; one that stays is killed."""
    process = daemon(commands)
    tree = _tree(process)
    with contextlib.suppress(MpsCommandError, MpsTimeoutError):
        await quit_daemon()
    if process is None:
        return

    async def gone() -> bool:
        return not any(map(_runs, tree))

    try:
        await until(gone, "", STOP_TIMEOUT_S)
    except MpsTimeoutError:
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        where = commands.pipe_directory
        await until(gone, f"the MPS daemon of {where} outlived SIGKILL", STOP_TIMEOUT_S)


def daemon(commands: Commands) -> psutil.Process | None:
    """The daemon's process according to its pid file, if it is one of this program."""
    try:
        pid = int((commands.pipe_directory / PID_FILE).read_text())
        process = psutil.Process(pid)
        ours = any(commands.program[-1] in word for word in process.cmdline())
    except (OSError, ValueError, psutil.Error):
        return None
    return process if ours else None


def _tree(process: psutil.Process | None) -> list[psutil.Process]:
    """The daemon and its servers."""
    if process is None:
        return []
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
