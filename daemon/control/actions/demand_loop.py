"""Swaps on demand, carried out: requests that wait for a model bring it up.

It gathers what `demand.decide` judges, begins its decisions as operations, and remembers which
models could not be brought up. It never judges itself. The invariant: a model that cannot be
brought up is refused for a while, with the reason, so that nobody waits for it in vain.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from daemon.control.actions.conductor import Conductor
from daemon.control.actions.demand import Bring, Occupant, Room, Wanted, decide
from daemon.control.actions.routing import Router
from daemon.control.errors import ControlError
from daemon.control.state.failures import failure_of
from daemon.control.state.operations import Operations
from daemon.control.state.planning import Resident, resident
from daemon.control.state.records import Cause, Failure, Intent, Kind
from daemon.control.state.running import Request
from daemon.control.state.world import Refusal, World
from engine.link.control import EngineStatus
from engine.link.routes import Demand as HeldDemand
from swap.errors import SwapError

ATTEMPTS_MAX = 3
RETRY_S_MIN = 0.2
REFUSAL_S_MIN = 5.0
REFUSAL_S_MAX = 60.0
# The loop also looks without being told, as a net under every wake-up that might be missed.
LOOK_INTERVAL_S = 1.0

# Failures that say nothing about the model: trying again may well succeed.
PASSING = frozenset(
    {
        "WORKER_CRASHED",
        "WORKER_UNAVAILABLE",
        "OPERATION_IN_PROGRESS",
        "INVALID_STATE",
        "CANCELLED",
        "TIMED_OUT",
        "QUEUE_FULL",
        "RECONCILING",
        "DAEMON_DRAINING",
    }
)

log = logging.getLogger(__name__)


class DemandLoop:
    """Carries demand out; run `run` as a task, and `wake` it when anything changed."""

    def __init__(
        self, world: World, conductor: Conductor, operations: Operations, router: Router
    ) -> None:
        self._world = world
        self._conductor = conductor
        self._operations = operations
        self._router = router
        self._wake = asyncio.Event()
        self._attempts: dict[str, int] = {}
        self._retry_s: dict[str, float] = {}
        self._kept_since_s: dict[str, float] = {}
        self._followers: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Something changed: look again."""
        self._wake.set()

    def held(self, demand: HeldDemand) -> None:
        """The gateway says which models' requests it holds."""
        self._world.held = {each.model: each for each in demand.models}
        self.wake()

    async def run(self) -> None:
        """Look whenever woken, for ever."""
        delay_s = LOOK_INTERVAL_S
        while True:
            try:
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # a look that was due
            self._wake.clear()
            self._expire()
            delay_s = await self.look()

    async def look(self) -> float:
        """Decide and act once; returns in how many seconds to look again at the latest."""
        world, scheduling = self._world, self._world.config.scheduling
        if not scheduling.swap_on_demand or not world.ready or world.stopping:
            return LOOK_INTERVAL_S
        decision = decide(
            self._wanted(),
            self._rooms(),
            scheduling.max_active_models,
            scheduling.min_residency_s,
        )
        for bring in decision.brings:
            await self._begin(bring)
        retries = [each - time.monotonic() for each in self._retry_s.values()]
        soonest = min([*retries, decision.look_again_s or LOOK_INTERVAL_S, LOOK_INTERVAL_S])
        return max(soonest, 0.001)

    # What is wanted, and what is where.

    def _wanted(self) -> list[Wanted]:
        now_s = time.monotonic()
        found = {
            model: (each.requests, each.oldest_s, "")
            for model, each in self._world.held.items()
            if each.requests
        }
        kept: dict[str, float] = {}
        for partition, client in self._world.processes.workers.items():
            for engine in client.state.engines:
                count = engine.running + engine.waiting
                if (engine.status is EngineStatus.STANDBY or engine.spare) and count:
                    since_s = self._kept_since_s.get(engine.model, now_s)
                    kept[engine.model] = since_s
                    held, oldest_s, _ = found.get(engine.model, (0, 0.0, ""))
                    oldest_s = max(oldest_s, now_s - since_s)
                    found[engine.model] = (held + count, oldest_s, partition)
        self._kept_since_s = kept
        wanted = []
        for model, (requests, oldest_s, partition) in found.items():
            size = self._size(model)
            if size is not None and self._retry_s.get(model, 0.0) <= now_s:
                self._retry_s.pop(model, None)
                views = self._world.views()
                pages = {view.id: view.pages(size) for view in views}
                wanted.append(Wanted(model, requests, oldest_s, pages, partition))
        return wanted

    def _size(self, model: str) -> Resident | None:
        """What a model takes; None when it is not to be brought up now."""
        world = self._world
        version = world.registry.get(model)
        if version is None or version.facts is None or version.failure is not None:
            return None
        if model in world.placements or self._operations.holder(f"model:{model}") is not None:
            return None
        if world.refusal(model) is not None:
            return None
        return resident(version, world.config.worker)

    def _rooms(self) -> list[Room]:
        world, now_s = self._world, time.monotonic()
        rooms = []
        for view in world.views():
            occupants = []
            for each in view.residents:
                engine = world.engine(each.model, view.id)
                requests = engine.running + engine.waiting if engine is not None else 0
                # What is there without being meant to be has been for as long as anybody knows.
                since_s = world.active_since_s.get(each.model, -math.inf)
                occupants.append(Occupant(each.model, view.pages(each), now_s - since_s, requests))
            busy = self._operations.holder(f"partition:{view.id}") is not None
            rooms.append(Room(view.id, view.pages_total, tuple(occupants), busy))
        return rooms

    # Acting.

    async def _begin(self, bring: Bring) -> None:
        scheduling = self._world.config.scheduling
        intent = Intent(
            kind=Kind.SWAP if bring.victims else Kind.LOAD,
            cause=Cause.DEMAND,
            partition=bring.partition,
            outgoing=bring.victims,
            incoming=bring.model,
            in_flight=scheduling.in_flight,
            drain_timeout_s=scheduling.drain_timeout_s,
        )
        try:
            operation = await self._conductor.submit(Request("demand"), intent)
        except (ControlError, SwapError) as error:
            self._failed(bring.model, failure_of(error))
            return
        follower = asyncio.create_task(self._follow(bring.model, operation.name))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)

    async def _follow(self, model: str, name: str) -> None:
        operation = await self._operations.wait(name, None)
        if operation.failure is not None:
            self._failed(model, operation.failure)
        else:
            self._attempts.pop(model, None)
        self.wake()

    def _failed(self, model: str, failure: Failure) -> None:
        attempts = self._attempts[model] = self._attempts.get(model, 0) + 1
        now_s = time.monotonic()
        if failure.reason in PASSING and attempts < ATTEMPTS_MAX:
            self._retry_s[model] = now_s + RETRY_S_MIN * 2**attempts
            return
        delay_s = min(REFUSAL_S_MIN * 2 ** min(attempts, 10), REFUSAL_S_MAX)
        log.warning("%s is refused for %.0f s: %s", model, delay_s, failure.message)
        self._world.refusals[model] = Refusal(failure, now_s + delay_s)
        self._router.publish_soon()

    def _expire(self) -> None:
        """Let requests for models whose refusal is over be held, and so tried, again."""
        now_s, refusals = time.monotonic(), self._world.refusals
        expired = [model for model, each in refusals.items() if each.until_s <= now_s]
        for model in expired:
            del refusals[model]
        if expired:
            self._router.publish_soon()
