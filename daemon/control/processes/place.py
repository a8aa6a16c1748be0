"""One process's place: how the process there is found, started, spoken to and ended.

A place is the gateway's, or one partition's worker's. It adopts what runs there, else starts it,
and knows when it is gone. It never decides to start again; the fleet does. Invariant: at most one
process per place; whatever cannot be spoken to is killed before another one is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.control.errors import ControlError, ProcessFailed
from daemon.control.notify import boot_id
from daemon.control.processes import process_record
from daemon.control.processes.child import Child, ProcessInfo
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.worker_client import WorkerClient
from engine.link import control, routes
from engine.link.errors import LinkError

START_TIMEOUT_S = 60.0
CONNECT_INTERVAL_S = 0.02
STOP_GRACE_S = 10.0
SHUTDOWN_MARGIN_S = 5.0

log = logging.getLogger(__name__)

GATEWAY = "gateway"
WORKER = "worker"

Client = GatewayClient | WorkerClient


class FleetEvents(Protocol):
    """What the fleet tells its owner; awaited, one at a time for each place."""

    async def worker_up(self, client: WorkerClient, adopted: bool) -> None: ...
    async def worker_down(self, partition: str, reason: str) -> None: ...
    async def worker_state(self, state: control.WorkerState) -> None: ...
    async def gateway_up(self, client: GatewayClient, adopted: bool) -> None: ...
    async def gateway_down(self, reason: str) -> None: ...
    async def demand(self, demand: routes.Demand) -> None: ...
    async def metrics(self) -> str: ...


async def _nobody(partition: str, pid: int) -> None:
    """Whoever holds nothing that outlives it may be killed."""


@dataclass(frozen=True)
class Commands:
    """How the processes are started: argument lists by generation; and made safe to kill."""

    runtime_dir: Path
    log_dir: Path | None
    """Where children's output goes; None: where this process's goes."""
    gateway: Callable[[int], list[str]]
    worker: Callable[[str, int], list[str]]
    release: Callable[[str, int], Awaitable[None]] = _nobody
    """Awaited before a partition's worker, by pid, is sent a signal; bounded, and never raises."""


class Place:
    """Where one process belongs. `client` and `child` are of the process that is there now."""

    def __init__(
        self, role: str, partition: str, directory: Path, commands: Commands, events: FleetEvents
    ) -> None:
        self.role = role
        self.partition = partition
        self.directory = directory
        self.child: Child | None = None
        self.client: Client | None = None
        self.generation = 0
        self.starts = 0
        self.adopted = False
        self.settled = asyncio.Event()
        """Set once it was up for the first time, or failed to start."""
        self.failure = ""
        self._commands = commands
        self._events = events
        self._boot_id = boot_id()
        self._closed = asyncio.Event()

    @property
    def name(self) -> str:
        return f"{self.role} {self.partition}".strip()

    @property
    def socket(self) -> Path:
        return self.directory / "control.sock"

    def info(self) -> ProcessInfo | None:
        """The running process, for people."""
        if self.child is None or not self.child.running:
            return None
        return ProcessInfo(
            self.role,
            self.partition,
            self.child.pid,
            self.generation,
            max(0, self.starts - 1),
            self.adopted,
            self.child.resident_bytes(),
        )

    async def bring_up(self) -> Client:
        """Adopt the process that runs here, or start one, and connect.

        Raises ControlError, LinkError, OSError or TimeoutError; `child` may be left running then.
        """
        await self.kill()  # One that SIGKILL has not ended yet stands in the next one's way.
        self._closed.clear()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        client = await self._adopt()
        self.adopted = client is not None
        if client is None:
            client = await self._start()
        self.client = client
        self.starts += 1
        log.info("%s is up (pid %d, adopted: %s)", self.name, client.pid, self.adopted)
        return client

    async def until_down(self) -> str:
        """Wait for the process's end; one that closed its link and lives on is killed."""
        child = self.child
        assert child is not None
        exited = asyncio.ensure_future(child.exited())
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait((exited, closed), return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SHUTDOWN_MARGIN_S):
                        await child.exited()
            if child.running:
                log.warning("%s closed its link and lives on: killing it", self.name)
                await self._kill(child)
            return await child.exited()
        finally:
            exited.cancel()
            closed.cancel()

    async def kill(self) -> None:
        """Kill the process that is here, whatever it does; a worker is released first.

        Raises ProcessFailed when that does not end it; whoever keeps the place hears of that too.
        """
        if self.child is None:
            return
        try:
            await self._kill(self.child)
        except ProcessFailed:
            self._closed.set()  # It answers nobody any more.
            raise

    async def clear(self) -> None:
        """Forget the process that was here; it has ended, or is killed now.

        Raises ProcessFailed when that does not end it; its link is closed all the same.
        """
        client, self.client = self.client, None
        if client is not None:
            await client.close()
        await self.kill()
        process_record.remove(self.directory)
        with contextlib.suppress(OSError):
            os.unlink(self.socket)

    async def end(self, drain_timeout_s: float) -> None:
        """Have the process finish its work for at most `drain_timeout_s`, and end."""
        if self.client is not None and not self.client.closed:
            with contextlib.suppress(LinkError, ControlError):
                # The answer may be lost with the process; its exit is what counts.
                await self.client.shutdown(drain_timeout_s)
        if self.child is not None:
            try:
                async with asyncio.timeout(drain_timeout_s + SHUTDOWN_MARGIN_S):
                    await self.child.exited()
            except TimeoutError:
                log.warning("%s did not end by itself; terminating it", self.name)
                await self._release(self.child)
                await self.child.stop(STOP_GRACE_S)
        process_record.remove(self.directory)

    async def leave(self) -> None:
        """Close the link and leave the process running."""
        if self.client is not None:
            await self.client.close()
        if self.child is not None:
            self.child.forget()

    async def _kill(self, child: Child) -> None:
        await self._release(child)
        await child.kill()

    async def _release(self, child: Child) -> None:
        if self.role == WORKER and child.running:
            await self._commands.release(self.partition, child.pid)

    async def _adopt(self) -> Client | None:
        """Take over the process that runs here, if one does and can be spoken to."""
        recorded = process_record.read(self.directory)
        try:
            client = await self._connect()
        except (OSError, TimeoutError, LinkError, ControlError) as error:
            if recorded is not None and recorded.boot_id == self._boot_id and recorded.alive():
                log.warning("%s (pid %d) does not answer: %s", self.name, recorded.pid, error)
                self.child = Child(recorded.pid)
                await self._kill(self.child)
            return None
        state = client.state
        if state.boot_id != self._boot_id or state.pid != client.pid:
            await client.close()
            raise ProcessFailed(
                f"{self.socket} is served by pid {client.pid}, which is not {self.name}: end it"
            )
        if state.protocol != control.PROTOCOL:
            log.warning("%s speaks protocol %d: replacing it", self.name, state.protocol)
            await client.close()
            await self._release(old := Child(client.pid))
            await old.stop(STOP_GRACE_S)
            return None
        self.child = Child(client.pid)
        self.generation = state.generation
        return client

    async def _start(self) -> Client:
        # Generations grow over restarts of the daemon too, so they are counted from the clock.
        self.generation = max(self.generation + 1, time.time_ns() // 1_000_000)
        if self.role == GATEWAY:
            arguments = self._commands.gateway(self.generation)
        else:
            arguments = self._commands.worker(self.partition, self.generation)
        log_dir = self._commands.log_dir
        log_path = log_dir / f"{_file_name(self.name)}.log" if log_dir else None
        self.child = Child.start(arguments, log_path)
        process_record.write(self.directory, self.child.pid, self._boot_id)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return await self._connect()
            except (OSError, TimeoutError, LinkError) as error:
                if not self.child.running:
                    where = f"; its log is {log_path}" if log_path else ""
                    raise ProcessFailed(
                        f"{self.name} did not start: {await self.child.exited()}{where}"
                    ) from error
                if time.monotonic() > deadline_s:
                    raise ProcessFailed(
                        f"{self.name} (pid {self.child.pid}) did not answer on {self.socket} "
                        f"within {START_TIMEOUT_S:g} s: {error}"
                    ) from error
            await asyncio.sleep(CONNECT_INTERVAL_S)

    async def _connect(self) -> Client:
        def on_closed(error: LinkError) -> None:
            self._closed.set()

        if self.role == GATEWAY:
            return await GatewayClient.connect(
                self.socket,
                on_demand=self._events.demand,
                on_metrics=self._events.metrics,
                on_closed=on_closed,
            )
        return await WorkerClient.connect(
            self.socket,
            self.partition,
            on_state=self._events.worker_state,
            on_closed=on_closed,
        )


def _file_name(name: str) -> str:
    """A place's name without what a file's name cannot have: instances have a slash in theirs."""
    return name.replace(" ", "-").replace("/", "-")
