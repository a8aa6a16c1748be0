"""Carrying out what was planned: images in, routes turned, exchanges run, or all as it was.

It owns the order of effects. For a swap: the image is ready and mapped; the gateway holds the
outgoing models' requests; the worker exchanges; as soon as weights are landing the gateway may send
the incoming model's requests, which get their first token behind the last layer; on success memory,
table and journal say so. The invariant: whatever fails, the worker is asked what is true, and the
table follows that; a request is sent only where its model is, or is about to be.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from hotbay.reasons import known

from daemon.control.actions import canaries
from daemon.control.actions.images import Images
from daemon.control.actions.routing import Router
from daemon.control.errors import CallRefused, ControlError
from daemon.control.failpoints import FailPoint, FailPoints
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.failures import Failed
from daemon.control.state.journal import Drop, Journal, Put
from daemon.control.state.planning import context_tokens, facts_of
from daemon.control.state.records import (
    Cause,
    Failure,
    Intent,
    LinkRate,
    Placement,
    Plan,
    Result,
    Stage,
)
from daemon.control.state.running import Handle, Outcome
from daemon.control.state.world import World
from engine.link.control import (
    Canary,
    EngineSpec,
    EngineStatus,
    Exchange,
    ExchangeResult,
    InFlight,
    Ledger,
    StageReached,
    StageWeights,
)
from engine.link.control import Stage as WorkerStage
from engine.link.errors import LinkClosed, LinkError

log = logging.getLogger(__name__)

Observe = Callable[[ExchangeResult, float], None]
"""Told how an exchange ended, and in how many milliseconds it was foreseen to."""


class Transitions:
    """The steps of every operation."""

    def __init__(
        self,
        world: World,
        images: Images,
        router: Router,
        journal: Journal,
        failpoints: FailPoints,
        observe: Observe,
    ) -> None:
        self._world = world
        self._images = images
        self._router = router
        self._journal = journal
        self._failpoints = failpoints
        self._observe = observe

    async def bring(self, handle: Handle, intent: Intent, plan: Plan) -> Outcome:
        """Load or swap: make `intent.incoming` ACTIVE, or STANDBY where the plan ends there."""
        world, key = self._world, intent.incoming
        canary = await canaries.wanted(intent, world.registry, self._images)
        if not plan.incoming:  # there already; a new canary is tried when it comes in again
            version = world.registry[key]
            there = Result(key, world.state(version)[0], plan.partition, plan.note)
            return Outcome(there, tuple(world.registry.set_canary(key, canary)))
        digest, built = await self._images.ensure(world.registry[key], handle)
        unwanted = False
        try:
            changes: list[Put | Drop] = [*world.registry.learn_digest(key, digest)]
            self._images.apply_pins()
            self._images.spread_soon()
            if intent.standby:
                changes += world.registry.set_canary(key, canary)
                return Outcome(Result(key, "STANDBY", "", plan.note), tuple(changes))
            client = world.worker(intent.partition)
            handle.update(stage=Stage.ATTACHING)
            await self._images.attach(digest, client)
            await self._failpoints.reach(FailPoint.ATTACHED)
            try:
                asked = canaries.asked(canary, digest)
                result, moved = await self._exchange(handle, client, intent, digest, asked)
                changes += canaries.keep(world.registry, key, canary, digest, result.canary)
            except CallRefused as error:
                # The plan counts what is guaranteed; only the worker knows what is lent out now.
                if error.reason != "INSUFFICIENT_DEVICE_MEMORY" or not _may_stay_standby(intent):
                    raise
                note = f"left STANDBY: {error}"
                changes += world.registry.set_canary(key, canary)
                return Outcome(Result(key, "STANDBY", "", note), tuple(changes))
            return Outcome(
                Result(key, "ACTIVE", intent.partition, ledger=result.ledger), (*changes, *moved)
            )
        except BaseException as error:
            # A worker's death says nothing against the image, and its successor will want it.
            unwanted = built and not isinstance(error, LinkError) and not world.stopping
            raise
        finally:
            self._images.unuse(digest)
            if unwanted:
                await self._images.discard(digest)

    async def take_off(self, handle: Handle, intent: Intent) -> Outcome:
        """Unload: take a model off its partition, and with `evict` out of host memory."""
        world, key = self._world, intent.outgoing[0]
        ledger: Ledger | None = None
        changes: list[Put | Drop] = []
        if intent.partition:
            client = world.worker(intent.partition)
            result, changes = await self._exchange(handle, client, intent, "")
            ledger = result.ledger
        message = "" if intent.partition else f"{key} was on no partition"
        digest = world.registry[key].digest
        if intent.evict and digest in world.store:
            handle.update(stage=Stage.EVICTING)
            await self._images.drop(digest)
        state = world.state(world.registry[key])[0]
        return Outcome(Result(key, state, "", message, ledger), tuple(changes))

    async def stage(self, handle: Handle, intent: Intent) -> Outcome:
        """Put a model's weights into memory of a partition that nobody needs: STAGED."""
        world, key = self._world, intent.incoming
        digest, _ = await self._images.ensure(world.registry[key], handle)
        self._images.use(digest)
        try:
            changes = tuple(world.registry.learn_digest(key, digest))
            self._images.spread_soon()
            client = world.worker(intent.partition)
            handle.update(stage=Stage.ATTACHING)
            await self._images.attach(digest, client)
            # What the daemon stages by itself makes nobody leave.
            displace = intent.cause is Cause.API
            wanted = intent.stage_bytes or world.first_bytes(
                world.registry[key], intent.stage_layers
            )
            request = StageWeights(handle.name, self._spec(key, digest), displace, wanted)
            handle.cancel_by(lambda: client.abandon(handle.name))
            try:
                result = await client.stage(request, _follow_stages(handle))
            finally:
                handle.cancel_by(None)
            if result.error or result.error_reason:
                raise Failed(_rolled_back(intent, client, result, WorkerStage.COPYING))
            self._router.publish_soon()
            return Outcome(Result(key, "STAGED", intent.partition, ledger=result.ledger), changes)
        finally:
            self._images.unuse(digest)

    async def calibrate(self, handle: Handle, partitions: tuple[str, ...]) -> Outcome:
        """Measure links, one after the other: partitions may share one."""
        found: list[LinkRate] = []
        for partition in partitions:
            handle.update(message=f"measuring {partition}")
            rate, out_rate = await self._world.worker(partition).measure_link()
            found.append(LinkRate(partition, rate, time.time(), out_rate))
        for link in found:
            self._world.history.links[link.partition] = link
        return Outcome(Result("", "", links=tuple(found)), tuple(Put(link) for link in found))

    async def drain(self, handle: Handle, intent: Intent) -> Outcome:
        """Stop a model's requests; its weights stay."""
        world, key, partition = self._world, intent.outgoing[0], intent.partition
        client = world.worker(partition)
        handle.update(stage=Stage.DRAINING)
        world.withhold(key)
        await self._router.publish()
        try:
            await client.drain(key, intent.in_flight, intent.drain_timeout_s)
            await self._failpoints.reach(FailPoint.DRAINED)
        except BaseException:
            with contextlib.suppress(ControlError, LinkError):
                await client.resume(key)
            await self.follow_worker(client, (key,))
            raise
        placement = Placement(key, partition, drained=True)
        world.placed(placement)
        self._router.publish_soon()
        return Outcome(Result(key, "STAGED", partition), (Put(placement),))

    async def resume(self, handle: Handle, intent: Intent) -> Outcome:
        """Let a drained model serve again; after a worker's restart that means to load it."""
        world, key, partition = self._world, intent.incoming, intent.partition
        client = world.worker(partition)
        engine = world.engine(key, partition)
        if engine is not None and engine.status in (EngineStatus.STAGED, EngineStatus.DRAINING):
            await client.resume(key)
            placement = Placement(key, partition)
            world.placed(placement)
            world.serve(key, partition)
            self._router.publish_soon()
            return Outcome(Result(key, "ACTIVE", partition), (Put(placement),))
        return await self.bring(handle, intent, Plan(partition=partition, incoming=key))

    async def follow_worker(self, client: WorkerClient, keys: tuple[str, ...]) -> None:
        """Ask the worker which of these models it serves, and let world and table follow."""
        world, partition = self._world, client.partition
        try:
            state = await client.describe()
        except (LinkError, ControlError) as error:
            # Then it is gone, and coming up again tells.
            log.warning("%s cannot be asked what it serves: %s", partition, error)
            for key in keys:
                world.withhold(key)
            self._router.publish_soon()
            return
        active = {each.model for each in state.engines if each.status is EngineStatus.ACTIVE}
        changes: list[Put | Drop] = []
        for key in keys:
            placement = world.placements.get(key)
            if key in active:
                placement = placement or Placement(key, partition)
                world.placed(placement)
                changes.append(Put(placement))
                if not placement.drained:
                    world.serve(key, partition)
            elif placement is not None and placement.drained:
                world.withhold(key)
            else:
                world.displaced(key)
                changes.append(Drop(Placement(key, partition)))
        self._router.publish_soon()
        try:
            await self._journal.commit(changes)
        except ControlError as error:
            log.error("where models are could not be written: %s", error)

    # Inside.

    async def _exchange(
        self,
        handle: Handle,
        client: WorkerClient,
        intent: Intent,
        digest: str,
        canary: Canary | None = None,
    ) -> tuple[ExchangeResult, list[Put | Drop]]:
        """Hold the outgoing models' requests, run the exchange to its end, and follow it.

        Raises Failed with the worker's reason when it was rolled back, CallRefused, or LinkError.
        """
        world, key = self._world, intent.incoming
        involved = (*intent.outgoing, *((key,) if key else ()))
        reached = WorkerStage.PLANNING

        def on_stage(event: StageReached) -> None:
            nonlocal reached
            if event.stage is not WorkerStage.ROLLING_BACK:
                reached = event.stage
            handle.update(
                stage=Stage(event.stage.value),
                bytes_done=event.bytes_done,
                bytes_total=event.bytes_total,
                requests_left=event.requests_left,
            )
            if event.stage is WorkerStage.COPYING:
                world.copying[client.partition] = event.bytes_total - event.bytes_done
            if event.stage is WorkerStage.COPYING and key and key not in world.serving:
                world.serve(key, client.partition)
                self._router.publish_soon()

        view = world.view(client.partition)
        busy = intent.in_flight is InFlight.DRAIN and any(
            model in view.busy for model in intent.outgoing
        )
        committed = False
        try:
            for model in intent.outgoing:
                world.withhold(model)
            if intent.outgoing:
                await self._router.publish()
            await self._failpoints.reach(FailPoint.HELD)
            handle.cancel_by(lambda: client.abandon(handle.name))
            message = self._message(handle, intent, digest, canary)
            result = await client.exchange(message, on_stage)
            if result.error or result.error_reason:
                self._observe(result, 0.0)
                raise Failed(_rolled_back(intent, client, result, reached))
            committed = True
            await self._failpoints.reach(FailPoint.EXCHANGED)
            changes = self._follow_commit(intent)
            await self._failpoints.reach(FailPoint.PLACED)
        except BaseException as error:
            if isinstance(error, LinkClosed):
                for model in involved:
                    world.withhold(model)
                self._router.publish_soon()
            elif not world.stopping:
                log.info("%s: %s; committed: %s", handle.name, error, committed)
                await self.follow_worker(client, involved)
            raise
        finally:
            handle.cancel_by(None)
            world.copying.pop(client.partition, None)
            world.exchanged_s[client.partition] = time.monotonic()
        self._observe(result, handle.record.plan.predicted_ms)
        world.history.note(client.partition, result.ledger, busy=busy)
        return result, changes

    def _message(
        self, handle: Handle, intent: Intent, digest: str, canary: Canary | None
    ) -> Exchange:
        key = intent.incoming
        return Exchange(
            operation=handle.name,
            outgoing=intent.outgoing,
            incoming=self._spec(key, digest) if key else None,
            in_flight=intent.in_flight,
            drain_timeout_s=intent.drain_timeout_s,
            discard=not key,
            keep_staged=bool(key),
            canary=canary,
        )

    def _spec(self, key: str, digest: str) -> EngineSpec:
        worker = self._world.config.worker
        return EngineSpec(
            model=key,
            digest=digest,
            context_tokens=context_tokens(facts_of(self._world.registry[key]), worker),
            running_requests_max=worker.running_requests_max,
            waiting_requests_max=worker.waiting_requests_max,
            weight=self._world.config.scheduling.weight(key),
            kv_dtype=worker.kv_dtype,
        )

    def _follow_commit(self, intent: Intent) -> list[Put | Drop]:
        """Let world and table follow a committed exchange; returns what is to be journalled."""
        world = self._world
        changes: list[Put | Drop] = []
        for model in intent.outgoing:
            placement = world.placements.get(model)
            if placement is not None:
                changes.append(Drop(placement))
            world.displaced(model)
        if intent.incoming:
            placement = Placement(intent.incoming, intent.partition)
            world.placed(placement)
            world.serve(intent.incoming, intent.partition)
            changes.append(Put(placement))
        self._router.publish_soon()
        return changes


def _follow_stages(handle: Handle) -> Callable[[StageReached], None]:
    def follow(event: StageReached) -> None:
        handle.update(
            stage=Stage(event.stage.value),
            bytes_done=event.bytes_done,
            bytes_total=event.bytes_total,
        )

    return follow


def _may_stay_standby(intent: Intent) -> bool:
    return intent.cause is Cause.API and not intent.outgoing


def _rolled_back(
    intent: Intent, client: WorkerClient, result: ExchangeResult, reached: WorkerStage
) -> Failure:
    stays = ", ".join(intent.outgoing)
    after = f"; {stays} serves again" if stays and result.rolled_back else ""
    reason = known(result.error_reason)
    return Failure(
        reason.value if reason is not None else "EXCHANGE_FAILED",
        f"the {intent.kind.value} on {client.partition} failed at {reached.value} and was rolled "
        f"back: {result.error or result.error_reason}{after}",
        {"stage": reached.value, "partition": client.partition, "incoming": intent.incoming},
    )
