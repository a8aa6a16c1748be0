"""The fleet: one gateway, and one worker for each partition, kept running; partitions may change.

For each place a keeper does the same for ever: bring its process up, report it, wait for its end,
report that, wait a little longer each time it ended early. It knows no models and decides nothing
about them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable
from functools import partial

import psutil

from daemon.control.errors import ControlError, ProcessFailed
from daemon.control.processes.child import ProcessInfo
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.place import (
    GATEWAY,
    SHUTDOWN_MARGIN_S,
    WORKER,
    Commands,
    FleetEvents,
    Place,
)
from daemon.control.processes.worker_client import WorkerClient
from engine.link import routes
from engine.link.directories import worker_directory
from engine.link.errors import LinkError

RESTART_DELAY_S_MIN = 0.1
RESTART_DELAY_S_MAX = 5.0
HEALTHY_AFTER_S = 30.0

log = logging.getLogger(__name__)


class Fleet:
    """Keeps the processes of `partitions` and the gateway running; see the module's text."""

    def __init__(
        self, commands: Commands, partitions: tuple[str, ...], events: FleetEvents
    ) -> None:
        self._commands = commands
        root = commands.runtime_dir
        self._events = events
        self._started = False
        self._stopping = False
        self._gateway = Place(GATEWAY, "", root / "gateway", commands, events)
        self._places = {partition: self._place(partition) for partition in partitions}
        self._keepers: dict[str, asyncio.Task[None]] = {}

    @property
    def gateway(self) -> GatewayClient | None:
        """The connected gateway, if it is up."""
        client = self._gateway.client
        return client if isinstance(client, GatewayClient) and not client.closed else None

    @property
    def workers(self) -> dict[str, WorkerClient]:
        """The connected workers, by partition."""
        return {
            partition: place.client
            for partition, place in self._places.items()
            if isinstance(place.client, WorkerClient) and not place.client.closed
        }

    def failure(self, partition: str) -> str:
        """Why a partition's worker is not up; empty while it is, or while it starts."""
        place = self._places.get(partition)
        return "its GPU is being cut anew" if place is None else place.failure

    def addresses(self) -> tuple[routes.WorkerAddress, ...]:
        """Where the gateway finds the connected workers."""
        return tuple(
            routes.WorkerAddress(
                partition=partition,
                tokens_socket=str(self._places[partition].directory / "tokens.sock"),
                generation=self._places[partition].generation,
            )
            for partition in self.workers
        )

    def processes(self) -> list[ProcessInfo]:
        """This process first, then the gateway, then the workers that run."""
        own = psutil.Process()
        infos = [ProcessInfo("hotbayd", "", own.pid, 0, 0, False, int(own.memory_info().rss))]
        places = (place.info() for place in (self._gateway, *self._places.values()))
        infos.extend(info for info in places if info is not None)
        return infos

    async def start(self) -> None:
        """Adopt or start everything; returns once each place is up or has failed once.

        Raises ProcessFailed when the gateway cannot be brought up, since without it nothing serves.
        """
        self._started = True
        places = [self._gateway, *self._places.values()]
        for place in places:
            self._employ(place)
        await asyncio.gather(*(place.settled.wait() for place in places))
        if self.gateway is None:
            raise ProcessFailed(f"the gateway did not start: {self._gateway.failure}")

    def add(self, partition: str) -> None:
        """Keep a worker for one more partition, from now or, before the start, from then on."""
        if partition not in self._places:
            place = self._places[partition] = self._place(partition)
            if self._started:
                self._employ(place)

    async def settled(self, partition: str) -> None:
        """Wait until a partition's worker is up or has failed once."""
        place = self._places.get(partition)
        if place is not None:
            await place.settled.wait()

    async def remove(self, partition: str, drain_timeout_s: float) -> None:
        """Let a partition's worker finish its requests and end, and start none there again.

        Raises ProcessFailed when it does not end.
        """
        place = self._places.get(partition)
        if place is None:
            return
        keeper = self._keepers.pop(place.name, None)
        try:
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
                await place.end(drain_timeout_s)
                await place.clear()
                await self._events.worker_down(partition, "its GPU is being cut anew")
        finally:
            # What SIGKILL has not ended is for whoever is added here again.
            del self._places[partition]

    async def restart(self, partition: str) -> None:
        """Kill a partition's worker, whatever it does; its keeper starts another one.

        Raises ProcessFailed when it does not end; its keeper sees to it then.
        """
        place = self._places.get(partition)
        if place is not None:
            await place.kill()

    async def stop(self, drain_timeout_s: float) -> None:
        """End every process: the gateway drains first, then the workers."""
        self._stopping = True
        # First of all nobody may start anything again: a keeper that is between two attempts would.
        await self._cancel_keepers()
        await _each([self._gateway.end(drain_timeout_s)])
        await _each(place.end(SHUTDOWN_MARGIN_S) for place in self._places.values())

    async def kill(self) -> None:
        """End every process at once, whatever it is doing."""
        self._stopping = True
        await self._cancel_keepers()
        await _each(place.clear() for place in (self._gateway, *self._places.values()))

    async def detach(self) -> None:
        """Close the links and leave every process running."""
        self._stopping = True
        await self._cancel_keepers()
        for place in (self._gateway, *self._places.values()):
            await place.leave()

    async def _cancel_keepers(self) -> None:
        for task in self._keepers.values():
            task.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    def _place(self, partition: str) -> Place:
        directory = worker_directory(self._commands.runtime_dir, partition)
        return Place(WORKER, partition, directory, self._commands, self._events)

    def _employ(self, place: Place) -> None:
        keeper = asyncio.create_task(self._keep(place), name=f"keep {place.name}")
        # A keeper only ends by a bug; nobody may then wait for its place for ever.
        keeper.add_done_callback(partial(_settle, place))
        self._keepers[place.name] = keeper

    async def _keep(self, place: Place) -> None:
        delay_s = RESTART_DELAY_S_MIN
        while True:
            started_s = time.monotonic()
            try:
                client = await place.bring_up()
                if isinstance(client, GatewayClient):
                    await self._events.gateway_up(client, place.adopted)
                else:
                    await self._events.worker_up(client, place.adopted)
                place.failure = ""
                place.settled.set()
                reason = await place.until_down()
            except (ControlError, LinkError, OSError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            if self._stopping:
                return
            log.warning("%s is down: %s", place.name, reason)
            place.failure = reason
            try:
                await place.clear()
            except ControlError as error:
                # It is killed again before another one is started.
                log.error("%s cannot be cleared away: %s", place.name, error)
                place.failure = str(error)
            if place.role == GATEWAY:
                await self._events.gateway_down(reason)
            else:
                await self._events.worker_down(place.partition, reason)
            place.settled.set()
            healthy = time.monotonic() - started_s > HEALTHY_AFTER_S
            delay_s = RESTART_DELAY_S_MIN if healthy else min(delay_s * 2, RESTART_DELAY_S_MAX)
            await asyncio.sleep(delay_s)


async def _each(endings: Iterable[Awaitable[None]]) -> None:
    """Go through all of them, at the same time; a process that does not end is left behind."""
    for problem in await asyncio.gather(*endings, return_exceptions=True):
        if isinstance(problem, ControlError):
            log.error("%s", problem)
        elif problem is not None:
            raise problem


def _settle(place: Place, keeper: asyncio.Task[None]) -> None:
    place.settled.set()
