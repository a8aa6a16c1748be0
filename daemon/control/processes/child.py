"""Child processes that outlive hotbayd, and how they are watched.

A child is started in a session of its own, so that neither a terminal's Ctrl-C nor hotbayd's death
ends it, and is watched through a pidfd, which works the same for a child that this daemon started
and for one it adopted, and never confuses a reused pid. The module never decides to restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from daemon.control.errors import ProcessFailed

KILL_TIMEOUT_S = 10.0
LOG_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class ProcessInfo:
    """A process of the daemon's, for status and metrics."""

    role: str
    partition: str
    pid: int
    generation: int
    restarts: int
    adopted: bool
    resident_bytes: int


class Child:
    """A running process, started or adopted. Must be made on a running event loop."""

    def __init__(self, pid: int, *, popen: subprocess.Popen[bytes] | None = None) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise ProcessFailed(f"process {pid} is gone") from error
        self.pid = pid
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def start(cls, arguments: list[str], log: Path | None) -> Child:
        """Start a process in its own session, its output appended to `log` (None: inherited).

        Raises ProcessFailed when it cannot be executed.
        """
        if log is not None and log.exists() and log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("ab")) if log is not None else None
            try:
                popen = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessFailed(f"cannot start {arguments[0]}: {error}") from error
        with contextlib.suppress(ProcessLookupError):
            # The daemon's own precedence is not for its children.
            os.setpriority(os.PRIO_PROCESS, popen.pid, 0)
        return cls(popen.pid, popen=popen)

    @property
    def running(self) -> bool:
        return not self._exited.done()

    async def exited(self) -> str:
        """Wait for the end; says how it ended, as far as that can be known."""
        return await asyncio.shield(self._exited)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process; nothing happens when it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, wait `grace_s`, then SIGKILL. Returns once the process is gone."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.exited()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await self.exited()
        except TimeoutError as error:
            raise ProcessFailed(
                f"process {self.pid} did not end within {KILL_TIMEOUT_S:g} s of SIGKILL: "
                "it is stuck in the kernel; look at its stack in /proc"
            ) from error

    def resident_bytes(self) -> int:
        """Memory it holds now; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def forget(self) -> None:
        """Stop watching and leave it running."""
        if self.running:
            self._close()
            self._exited.cancel()

    def _on_exit(self) -> None:
        self._close()
        self._exited.set_result(self._describe_exit())

    def _close(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)

    def _describe_exit(self) -> str:
        if self._popen is None:
            return f"process {self.pid} ended"
        code = self._popen.wait()
        if code < 0:
            return f"process {self.pid} was ended by {signal.Signals(-code).name}"
        return f"process {self.pid} exited with code {code}"
