"""What load, unload, swap, drain and resume mean: from a wish to a plan to an operation.

It owns the rules: which wishes make sense as things stand, which partition a model goes to, what an
operation claims. It plans on the calling task, without waiting, so that a wish that cannot be met
is answered at once; `transitions` then carries the plan out. The invariant: an operation is planned
again, by the same rules, once it holds its claims, since the world may have moved while it stood in
line.
"""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec

from daemon.control.actions.images import Images
from daemon.control.actions.transitions import Transitions
from daemon.control.errors import Refused
from daemon.control.failpoints import FailPoint, FailPoints
from daemon.control.state.operations import Operations
from daemon.control.state.planning import PartitionView, facts_of, place, plan_move
from daemon.control.state.records import (
    Cause,
    Intent,
    Kind,
    Operation,
    Plan,
    Result,
    Stage,
    Version,
)
from daemon.control.state.running import Handle, Outcome, Request, foreseen
from daemon.control.state.world import World
from engine.link.control import InFlight

READY_WAIT_S = 10.0


class Conductor:
    """Turns wishes into operations."""

    def __init__(
        self,
        world: World,
        images: Images,
        operations: Operations,
        transitions: Transitions,
        failpoints: FailPoints,
    ) -> None:
        self._world = world
        self._images = images
        self._operations = operations
        self._transitions = transitions
        self._failpoints = failpoints

    async def submit(
        self, request: Request, wish: Intent, *, validate_only: bool = False
    ) -> Operation:
        """Plan a wish, whose models may be written in any way, and begin it as an operation.

        With `validate_only` the answer is a finished operation without a name that holds the plan.
        Raises ControlError or SwapError when the wish cannot be met as things stand.
        """
        await self.admit(wish.cause)
        if not validate_only:
            existing = await self._operations.replay(request)
            if existing is not None:
                return existing
        intent, plan = self.prepare(wish)
        if validate_only:
            return foreseen(request, intent, plan, self._foreseen(intent, plan))
        claimed = claims(intent)
        if intent.kind is Kind.CALIBRATE:
            claimed = tuple(f"partition:{each}" for each in self._calibrated(intent))
        return await self._operations.begin(request, intent, plan, claimed, self.run)

    async def admit(self, cause: Cause = Cause.API) -> None:
        """Wait for a starting daemon. Raises Refused (RECONCILING, DAEMON_DRAINING)."""
        world = self._world
        if not world.ready and not world.stopping and cause is not Cause.RECOVERY:
            try:
                async with asyncio.timeout(READY_WAIT_S):
                    await world.became_ready.wait()
            except TimeoutError:
                raise Refused(
                    "the daemon is still finding out what runs here", reason="RECONCILING"
                ) from None
        if world.stopping:
            raise Refused("the daemon is stopping", reason="DAEMON_DRAINING")

    async def run(self, handle: Handle) -> Outcome:
        """Carry an operation out, now that it holds its claims."""
        await self._failpoints.reach(FailPoint.BEGUN)
        handle.update(stage=Stage.PLANNING)
        intent, plan = self.prepare(handle.record.intent)
        if intent.incoming and plan.incoming and not plan.partition:
            intent = msgspec.structs.replace(intent, partition="", standby=True)
        plan = msgspec.structs.replace(plan, note=plan.note or handle.record.plan.note)
        handle.update(plan=plan, message=plan.note)
        steps = self._transitions
        if intent.kind in (Kind.LOAD, Kind.SWAP):
            return await steps.bring(handle, intent, plan)
        if intent.kind is Kind.UNLOAD:
            return await steps.take_off(handle, intent)
        if intent.kind is Kind.DRAIN:
            return await steps.drain(handle, intent)
        if intent.kind is Kind.STAGE:
            return await steps.stage(handle, intent)
        if intent.kind is Kind.CALIBRATE:
            return await steps.calibrate(handle, self._calibrated(intent))
        return await steps.resume(handle, intent)

    # Planning.

    def prepare(self, wish: Intent) -> tuple[Intent, Plan]:
        """Resolve a wish's models and partition, and plan it."""
        outgoing = tuple(self._world.registry.resolve(text).key for text in wish.outgoing)
        incoming = self._world.registry.resolve(wish.incoming).key if wish.incoming else ""
        intent = msgspec.structs.replace(wish, outgoing=outgoing, incoming=incoming)
        if intent.kind is Kind.LOAD:
            return self._prepare_load(intent)
        if intent.kind is Kind.SWAP:
            return self._prepare_swap(intent)
        if intent.kind is Kind.STAGE:
            return self._prepare_stage(intent)
        if intent.kind is Kind.CALIBRATE:
            for partition in self._calibrated(intent):
                self._world.worker(partition)
            return intent, Plan(partition=intent.partition)
        return self._prepare_other(intent)

    def _calibrated(self, intent: Intent) -> tuple[str, ...]:
        return (intent.partition,) if intent.partition else tuple(self._world.partitions)

    def _prepare_load(self, intent: Intent) -> tuple[Intent, Plan]:
        world, key = self._world, intent.incoming
        version = world.registry[key]
        facts_of(version)
        placement = world.placements.get(key)
        if placement is not None and placement.drained and not intent.standby:
            raise _invalid(f"{key} is drained on {placement.partition}: resume it", key)
        if key in world.serving or (placement is not None and intent.cause is not Cause.RECOVERY):
            where = world.serving.get(key) or world.placements[key].partition
            if intent.partition and intent.partition != where:
                raise _invalid(
                    f"{key} is on {where}: unload it there before loading it elsewhere", key
                )
            replaced = msgspec.structs.replace(intent, partition=where)
            return replaced, Plan(partition=where, note=f"{key} is on {where} already")
        if intent.partition and intent.cause is not Cause.RECOVERY:
            world.require_open(intent.partition)
        build_bytes, evictions = self._building(version)
        incoming = world.incoming(version)
        if intent.standby:
            plan = Plan(incoming=key, build_bytes=build_bytes)
        else:
            if not intent.partition:
                world.require_any_open()
            views: list[PartitionView] = (
                [world.view(intent.partition, key)] if intent.partition else world.views(key)
            )
            most = world.config.scheduling.max_active_models
            plan = place(views, incoming, most, build_bytes)
            standby = not plan.partition
            if standby and intent.cause is Cause.DEMAND:
                raise Refused(plan.note, reason="INSUFFICIENT_DEVICE_MEMORY")
            intent = msgspec.structs.replace(intent, partition=plan.partition, standby=standby)
        return intent, msgspec.structs.replace(plan, host_evictions=evictions)

    def _prepare_swap(self, intent: Intent) -> tuple[Intent, Plan]:
        world, key = self._world, intent.incoming
        version = world.registry[key]
        incoming = world.incoming(version)
        if key in world.placements:
            raise _invalid(f"{key} is on {world.placements[key].partition} already", key)
        partition = intent.partition
        for model in intent.outgoing:
            placement = world.placements.get(model)
            if placement is None or (partition and placement.partition != partition):
                state = world.state(world.registry[model])[0]
                where = f"on {placement.partition}" if placement else f"{state}, on no partition"
                raise _invalid(
                    f"{model} is {where}"
                    + (f", not on {partition}" if placement else f": load {key} instead"),
                    model,
                )
            partition = placement.partition
        world.require_open(partition)
        intent = msgspec.structs.replace(intent, partition=partition)
        build_bytes, evictions = self._building(version)
        plan = plan_move(
            world.view(partition, key),
            intent.outgoing,
            incoming,
            build_bytes,
            _drain_s(intent),
            intent.in_flight,
        )
        return intent, msgspec.structs.replace(plan, host_evictions=evictions)

    def _prepare_stage(self, intent: Intent) -> tuple[Intent, Plan]:
        """Where there is most room for the weights alone; who is staged there may go for it."""
        world, key = self._world, intent.incoming
        version = world.registry[key]
        # Its KV finds room when it comes to serve, as the plan of that will say.
        weights = dataclasses.replace(world.incoming(version), kv_bytes_min=0)
        wanted = intent.stage_bytes or world.first_bytes(version, intent.stage_layers)
        if 0 < wanted < weights.weights_bytes:
            # Of packed weights fewer bytes cross the link.
            copied = wanted * (weights.copy_bytes or weights.weights_bytes) // weights.weights_bytes
            weights = dataclasses.replace(weights, weights_bytes=wanted, copy_bytes=copied)
        placement = world.placements.get(key)
        if placement is not None:
            state = world.state(version)[0]
            raise _invalid(f"{key} is {state} on {placement.partition} already", key)
        build_bytes, evictions = self._building(version)
        if intent.partition:
            world.require_open(intent.partition)
        staged_on = world.staged_on(key)
        there = intent.partition or (staged_on if world.is_open(staged_on) else "")
        if not there:
            world.require_any_open()
        views = [world.view(there, key)] if there else world.views(key)
        if not views:
            raise Refused(
                "no partition's worker is up: see `gpuctl status` for the reason",
                reason="WORKER_UNAVAILABLE",
            )
        view = max(views, key=lambda each: (each.pages_free * each.page_bytes, each.id))
        plan = plan_move(view, (), weights, build_bytes)
        intent = msgspec.structs.replace(intent, partition=view.id)
        return intent, msgspec.structs.replace(plan, host_evictions=evictions)

    def _prepare_other(self, intent: Intent) -> tuple[Intent, Plan]:
        world = self._world
        key = (*intent.outgoing, intent.incoming)[0]
        placement = world.placements.get(key)
        partition = placement.partition if placement is not None else ""
        if intent.kind is Kind.UNLOAD and not partition:
            # Of a model that is on none a worker may still keep requests: these end then.
            partition = world.staged_on(key) or world.kept_on(key)
        state = world.state(world.registry[key])[0]
        if intent.kind is Kind.DRAIN and (placement is None or placement.drained):
            raise _invalid(f"{key} is {state}: only an ACTIVE model can be drained", key)
        if intent.kind is Kind.RESUME and (placement is None or not placement.drained):
            raise _invalid(f"{key} is {state}: only a drained model can be resumed", key)
        if intent.kind is Kind.RESUME and world.closures.tainted(partition):
            world.require_open(partition)
        intent = msgspec.structs.replace(intent, partition=partition)
        plan = Plan(partition=partition, outgoing=intent.outgoing, incoming=intent.incoming)
        if intent.kind is Kind.UNLOAD and partition:
            plan = plan_move(world.view(partition), intent.outgoing, None, 0, _drain_s(intent))
        elif partition:
            world.worker(partition)
        return intent, plan

    def _building(self, version: Version) -> tuple[int, tuple[str, ...]]:
        """Bytes to be read into host memory, and the models whose images would leave for it."""
        if self._images.present(version):
            return 0, ()
        needed = facts_of(version).segment_bytes
        leaving = self._images.evictions(needed)
        names = (self._world.registry.of_digest(digest) or [digest[:12]] for digest in leaving)
        return needed, tuple(key for keys in names for key in keys)

    def _foreseen(self, intent: Intent, plan: Plan) -> Result:
        model = intent.incoming or (intent.outgoing[0] if intent.outgoing else "")
        states = {Kind.UNLOAD: "STANDBY", Kind.DRAIN: "STAGED", Kind.STAGE: "STAGED"}
        state = "STANDBY" if intent.standby else states.get(intent.kind, "ACTIVE")
        return Result(model, state, plan.partition, plan.note)


def claims(intent: Intent) -> tuple[str, ...]:
    """What an operation holds while it runs."""
    models = (*intent.outgoing, intent.incoming)
    claimed = [f"model:{key}" for key in dict.fromkeys(models) if key]
    if intent.kind is Kind.STAGE:
        # The partition stays free for whoever wants to change it: staging gives way.
        return tuple(claimed)
    return (*([f"partition:{intent.partition}"] if intent.partition else []), *claimed)


def _drain_s(intent: Intent) -> float:
    """How long running requests are given, by the policy."""
    return intent.drain_timeout_s if intent.in_flight is InFlight.DRAIN else 0.0


def _invalid(message: str, key: str) -> Refused:
    return Refused(message, reason="INVALID_STATE", metadata={"model": key})
