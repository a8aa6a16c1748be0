"""Starting is recovering: what runs is asked what is true, and what is missing is brought back.

It owns the comparison of the journal with the workers, at start and whenever a worker comes up. It
decides nothing new: operations that were open are finished or declared rolled back as their worker
says, pulls go on, models that were placed are brought back from the host store, and a worker's word
about what is ACTIVE always wins over the journal's. The invariant: what serves is never disturbed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from daemon.control.actions import pulls
from daemon.control.actions.conductor import Conductor, claims
from daemon.control.actions.images import Images
from daemon.control.actions.layout_changes import LayoutChanges
from daemon.control.actions.routing import Router
from daemon.control.actions.transitions import Transitions
from daemon.control.errors import ControlError
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.failures import Failed
from daemon.control.state.journal import Drop, Journal, Put
from daemon.control.state.operations import Operations
from daemon.control.state.records import (
    Cause,
    Failure,
    Intent,
    Kind,
    Operation,
    Placement,
    Result,
    Stage,
)
from daemon.control.state.running import Handle, Outcome, Request
from daemon.control.state.world import World, on_device, staged
from engine.link.control import EngineStatus, ExchangeResult, WorkerState
from engine.link.errors import LinkError
from swap.errors import SwapError

FOLLOW_INTERVAL_S = 0.05
# How often in a row a model may be lost to its worker's end before it is left off.
RESTORES_MAX = 3
RESTORE_STABLE_S = 60.0

log = logging.getLogger(__name__)


class Recovery:
    """Brings the world and the workers together."""

    def __init__(
        self,
        world: World,
        journal: Journal,
        operations: Operations,
        images: Images,
        conductor: Conductor,
        transitions: Transitions,
        router: Router,
        puller: pulls.Pulls,
        layout_changes: LayoutChanges,
    ) -> None:
        self._world = world
        self._journal = journal
        self._operations = operations
        self._images = images
        self._conductor = conductor
        self._transitions = transitions
        self._router = router
        self._pulls = puller
        self._layout_changes = layout_changes
        self._restores: dict[str, list[float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def settle(self, open_operations: Iterable[Operation]) -> None:
        """At start: decide every open operation and learn what each connected worker holds.

        Operations whose worker is still exchanging are followed in the background; their partition
        is claimed until then.
        """
        waiting = list(open_operations)
        for client in list(self._world.processes.workers.values()):
            here = [each for each in waiting if each.intent.partition == client.partition]
            waiting = [each for each in waiting if each not in here]
            for operation in here:
                self._operations.readopt(operation, claims(operation.intent), self._follow)
            await self.adopt(client)
        for operation in waiting:
            if operation.intent.kind is Kind.PULL:
                # What was fetched is on disk, and no worker has a part in it: it just goes on.
                held = pulls.claims(operation.intent)
                self._operations.readopt(operation, held, self._pulls.run)
            elif operation.intent.kind is Kind.LAYOUT:
                self._operations.readopt(operation, (), self._layout_changes.after_restart)
            else:
                self._operations.readopt(operation, (), _interrupted)

    async def adopt(self, client: WorkerClient) -> None:
        """Learn from a worker which models it serves and whose images they are."""
        world, partition = self._world, client.partition
        changes: list[Put | Drop] = []
        for engine in client.state.engines:
            # One of another dtype serves on; when the model comes in again, it is built anew.
            if not world.outdated(engine.digest):
                changes += world.registry.learn_digest(engine.model, engine.digest)
            if not on_device(engine) or world.registry.get(engine.model) is None:
                continue
            before = world.placements.get(engine.model)
            drained = engine.status is not EngineStatus.ACTIVE
            if drained and before is not None and world.closures.tainted(partition):
                continue  # it was paused because its GPU is in trouble, and is to go on
            if drained and (before is None or client.state.exchanging):
                continue  # on its way in or out; whoever follows the exchange will say
            placement = Placement(engine.model, partition, drained and before is not None)
            if placement != before:
                changes.append(Put(placement))
            world.placed(placement)
            if not placement.drained:
                world.serve(engine.model, partition)
        self._images.worker_up(client)
        await self._journal.commit(changes)

    def restore(self, client: WorkerClient) -> None:
        """Bring back, in the background, what was placed on a worker that does not have it."""
        task = asyncio.create_task(self._restore(client), name=f"restore {client.partition}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restore(self, client: WorkerClient) -> None:
        world, partition = self._world, client.partition
        missing = [
            placement
            for key in world.residents(partition)
            if not (placement := world.placements[key]).drained and key not in world.serving
            if not self._paused(key, partition)
        ]
        for placement in missing:
            key = placement.model
            while (holder := self._operations.holder(f"model:{key}")) is not None:
                await self._operations.wait(holder.name, None)
            if client.closed or key in world.serving or world.placements.get(key) != placement:
                continue  # that operation said where it is, or another worker's start will
            problem = self._too_often(key)
            if not problem:
                problem = await self._bring_back(key, partition)
            if problem and world.placements.get(key) == placement:
                log.warning("%s is not brought back to %s: %s", key, partition, problem)
                world.warnings.append(f"{key} was not brought back to {partition}: {problem}")
                world.displaced(key)
                self._router.publish_soon()
                await self._journal.commit([Drop(placement)])

    def _paused(self, key: str, partition: str) -> bool:
        """Whether a model is there and waits for its GPU to be proven healthy."""
        engine = self._world.engine(key, partition)
        return engine is not None and on_device(engine) and self._world.closures.tainted(partition)

    async def _bring_back(self, key: str, partition: str) -> str:
        """Returns why it could not be done; empty when it was, or when it is to be tried again."""
        intent = Intent(kind=Kind.LOAD, cause=Cause.RECOVERY, partition=partition, incoming=key)
        try:
            operation = await self._conductor.submit(Request("recovery"), intent)
            operation = await self._operations.wait(operation.name, None)
        except LinkError:
            return ""
        except (ControlError, SwapError) as error:
            return "" if error.reason == "WORKER_UNAVAILABLE" else str(error)
        failure = operation.failure
        if failure is not None:
            # When the worker died again, its next start brings this model back.
            gone = failure.reason in ("WORKER_CRASHED", "WORKER_UNAVAILABLE")
            return "" if gone else failure.message
        assert operation.result is not None
        return "" if operation.result.state == "ACTIVE" else operation.result.message

    def _too_often(self, key: str) -> str:
        """A model that takes its worker down again and again must not do so for ever."""
        now_s = asyncio.get_running_loop().time()
        times = [t for t in self._restores.get(key, []) if now_s - t < RESTORE_STABLE_S]
        if len(times) >= RESTORES_MAX:
            return (
                f"its worker ended {RESTORES_MAX} times within {RESTORE_STABLE_S:g} s; "
                "load it again once the worker's log explains why"
            )
        self._restores[key] = [*times, now_s]
        return ""

    # Open operations of an earlier start.

    async def _follow(self, handle: Handle) -> Outcome:
        """Wait until the worker is through with an operation, and take its word for the end."""
        intent, name = handle.record.intent, handle.name
        client = self._world.worker(intent.partition)
        state = client.state
        while state.exchanging == name:
            handle.update(stage=Stage.COPYING)
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            state = await client.describe()
        involved = tuple(filter(None, (*intent.outgoing, intent.incoming)))
        if intent.kind in (Kind.DRAIN, Kind.RESUME):
            return await self._follow_drain(intent, client, state)
        if intent.kind is Kind.STAGE:
            return await self._follow_staging(handle, client)
        result = state.exchanged
        await self._transitions.follow_worker(client, involved)
        if result is None or result.operation != name:
            raise Failed(_unfinished(handle.record))
        if result.error or result.error_reason:
            raise Failed(_ended_badly(handle.record, result))
        model = intent.incoming or intent.outgoing[0]
        reached = "ACTIVE" if intent.incoming else "STANDBY"
        message = "finished by its worker while hotbayd was away"
        return Outcome(Result(model, reached, intent.partition, message, result.ledger))

    async def _follow_staging(self, handle: Handle, client: WorkerClient) -> Outcome:
        """A worker goes on staging by itself; what is there in the end says how it ended."""
        key = handle.record.intent.incoming
        while True:
            state = await client.describe()
            engine = next((each for each in state.engines if each.model == key), None)
            if engine is None or not engine.spare:
                raise Failed(_unfinished(handle.record))
            if staged(engine):
                message = "finished by its worker while hotbayd was away"
                return Outcome(Result(key, "STAGED", client.partition, message))
            await asyncio.sleep(FOLLOW_INTERVAL_S)

    async def _follow_drain(
        self, intent: Intent, client: WorkerClient, state: WorkerState
    ) -> Outcome:
        """A drain or resume that was under way is undone, so that the journal's word holds."""
        key = (*intent.outgoing, intent.incoming)[0]
        placement = self._world.placements.get(key)
        engine = next((each for each in state.engines if each.model == key), None)
        if placement is not None and not placement.drained and engine is not None:
            await client.resume(key)
            await self._transitions.follow_worker(client, (key,))
        raise Failed(
            Failure(
                "CANCELLED",
                f"hotbayd ended during this {intent.kind.value}; {key} is as it was before",
                {"model": key},
            )
        )


async def _interrupted(handle: Handle) -> Outcome:
    raise Failed(_unfinished(handle.record))


def _unfinished(record: Operation) -> Failure:
    return Failure(
        "CANCELLED",
        f"hotbayd ended at stage {record.stage.value} of {record.name}, before anything had "
        "changed; all is as it was: repeat the request with a new request_id",
        {"operation": record.name, "stage": record.stage.value},
    )


def _ended_badly(record: Operation, result: ExchangeResult) -> Failure:
    return Failure(
        result.error_reason or "EXCHANGE_FAILED",
        f"the {record.intent.kind.value} was rolled back: {result.error or result.error_reason}",
        {"operation": record.name, "partition": record.intent.partition},
    )
