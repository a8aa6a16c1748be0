"""What is done to the workers of a GPU in trouble: drained, proven, started again, emptied.

It owns the steps, each bounded in time. It never decides which comes next. The invariants: a step
that a worker does not answer ends all the same, and the next one finds out; no request is ended
that could be paused, unless an operator is needed, and then its client is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from daemon.control.actions.bring_back import BringBack
from daemon.control.actions.conductor import Conductor
from daemon.control.actions.routing import Router
from daemon.control.errors import ControlError
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.journal import Drop, Journal
from daemon.control.state.operations import Operations
from daemon.control.state.records import Cause, Intent, Kind
from daemon.control.state.running import Request
from daemon.control.state.world import World
from engine.link.control import EngineStatus, InFlight
from engine.link.errors import LinkError
from partitioner.errors import PartitionerError
from partitioner.gpu import Gpu
from partitioner.nvml_health import HealthReadings
from swap.errors import SwapError

CANCEL_TIMEOUT_S = 5.0
"""For a swap under way to be rolled back."""
UNLOAD_TIMEOUT_S = 15.0
LOOK_INTERVAL_S = 0.02

log = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[tuple[Gpu, ...]]]


class Readings(Protocol):
    """Reads what drivers tell; BoundedNvml."""

    async def health(self, uuid: str) -> HealthReadings: ...


class Restarts(Protocol):
    """The fleet, as far as a worker is made to start again."""

    async def restart(self, partition: str) -> None: ...


async def ask(readings: Readings, uuid: str) -> HealthReadings | None:
    """What a GPU's driver tells; None where the GPU does not answer."""
    try:
        return await readings.health(uuid)
    except PartitionerError as error:
        log.warning("%s", error)
        return None


class Steps:
    """The steps; see the module's text."""

    def __init__(
        self,
        world: World,
        journal: Journal,
        operations: Operations,
        conductor: Conductor,
        router: Router,
        fleet: Restarts,
        returning: BringBack,
        discover: Discover,
    ) -> None:
        self._world = world
        self._journal = journal
        self._operations = operations
        self._conductor = conductor
        self._router = router
        self._fleet = fleet
        self._returning = returning
        self._answer_timeout_s = world.config.health.answer_timeout_s
        self.discover = discover

    # Draining.

    async def drain(self, partitions: Iterable[str], timeout_s: float) -> None:
        """Until nothing runs there: what is under way is cancelled, requests end or are paused."""
        await asyncio.gather(*(self._drain(each, timeout_s) for each in partitions))

    async def _drain(self, partition: str, timeout_s: float) -> None:
        await self._cancel(f"partition:{partition}")
        client = self._world.processes.workers.get(partition)
        if client is None:
            return
        active = [each.model for each in client.state.engines if each.status is EngineStatus.ACTIVE]
        results = await asyncio.gather(
            *(self._drain_model(client, model, timeout_s) for model in active),
            return_exceptions=True,
        )
        for error in results:
            if isinstance(error, Exception):
                reason = str(error) or "its worker did not answer in time"
                log.warning("%s did not drain: %s", partition, reason)

    async def _drain_model(self, client: WorkerClient, model: str, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s + self._answer_timeout_s):
            await client.drain(model, InFlight.DRAIN, timeout_s)

    async def _cancel(self, claim: str) -> None:
        """Have the operation that holds a partition rolled back."""
        holder = self._operations.holder(claim)
        if holder is None:
            return
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await self._operations.cancel(holder.name)
                await self._operations.wait(holder.name, CANCEL_TIMEOUT_S)
        except (ControlError, LinkError, TimeoutError) as error:
            log.info("%s goes on beside the drain: %s", holder.name, error)

    # Proving.

    async def prove(self, partitions: tuple[str, ...], timeout_s: float) -> tuple[str, ...]:
        """Have every worker copy to its device, and its models serve again; who did not."""
        proven = await asyncio.gather(*(self._prove(each, timeout_s) for each in partitions))
        return tuple(each for each, well in zip(partitions, proven, strict=True) if not well)

    async def _prove(self, partition: str, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._connected(partition)
                async with asyncio.timeout(self._answer_timeout_s):
                    await client.describe()
                await client.measure_link()
                for model in self._paused(partition, client):
                    await client.resume(model)
                await self._all_active(partition, client)
        except (ControlError, LinkError, TimeoutError) as error:
            reason = str(error) or "its worker did not answer, or serve again, in time"
            log.warning("%s is not proven healthy: %s", partition, reason)
            return False
        return True

    async def _connected(self, partition: str) -> WorkerClient:
        """The worker, once it is up."""
        while True:
            client = self._world.processes.workers.get(partition)
            if client is not None:
                return client
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _paused(self, partition: str, client: WorkerClient) -> list[str]:
        """Models that are on the device and are not meant to be drained."""
        return [
            engine.model
            for engine in client.state.engines
            if engine.status in (EngineStatus.STAGED, EngineStatus.DRAINING) and not engine.spare
            if engine.model in self._meant(partition)
        ]

    async def _all_active(self, partition: str, client: WorkerClient) -> None:
        """Wait until whatever is meant to serve there does; a worker that started again gets its
        models back by recovery, which may also find that one cannot come back."""
        while True:
            engines = {each.model: each.status for each in client.state.engines}
            meant = self._meant(partition)
            if all(engines.get(key) is EngineStatus.ACTIVE for key in meant):
                for key in meant:
                    self._world.serve(key, partition)
                return
            if client.closed:
                client = await self._connected(partition)
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _meant(self, partition: str) -> list[str]:
        placements = self._world.placements
        return [key for key in self._world.residents(partition) if not placements[key].drained]

    # Mending.

    async def restart(self, partitions: Iterable[str]) -> None:
        """End the workers; they start again warm, and recovery brings their models back."""
        await asyncio.gather(*(self._restart(each) for each in partitions))

    async def _restart(self, partition: str) -> None:
        try:
            await self._fleet.restart(partition)
        except ControlError as error:
            # What it fails at next counts as one more attempt, and in the end an operator is asked.
            log.error("the worker of %s cannot be restarted: %s", partition, error)

    def placed_on(self, partitions: Iterable[str]) -> tuple[str, ...]:
        """The models that are meant to serve there."""
        return tuple(key for each in partitions for key in self._meant(each))

    async def move_away(self, partitions: Iterable[str]) -> None:
        """Take every model off, and let those that fit elsewhere serve there."""
        moved = []
        for partition in partitions:
            for key in self._meant(partition):
                moved.append(key)
                await self._take_off(key)
        self.bring_back(tuple(moved))

    async def _take_off(self, key: str) -> None:
        """Off its partition, by its worker if that still answers; paused requests end."""
        world, placement = self._world, self._world.placements.get(key)
        if placement is None:
            return  # Recovery, which gave it up, was faster.
        intent = Intent(
            Kind.UNLOAD, cause=Cause.RECOVERY, outgoing=(key,), in_flight=InFlight.ABORT
        )
        try:
            operation = await self._conductor.submit(Request("health"), intent)
            operation = await self._operations.wait(operation.name, UNLOAD_TIMEOUT_S)
            if not operation.done:
                # Whoever loads the model elsewhere would have to wait for its end.
                log.warning("%s is not off %s: its worker is killed", key, placement.partition)
                await self._restart(placement.partition)
        except (ControlError, LinkError, SwapError) as error:
            log.info("%s is taken off without its worker: %s", key, error)
        if world.placements.get(key) == placement:
            world.displaced(key)
            self._router.publish_soon()
            try:
                await self._journal.commit([Drop(placement)])
            except ControlError as error:
                log.error("that %s is off could not be written: %s", key, error)

    def bring_back(self, models: tuple[str, ...]) -> None:
        """In the background, load what does not serve, wherever there is room."""
        self._returning.later(models, "was taken off a GPU in trouble")
