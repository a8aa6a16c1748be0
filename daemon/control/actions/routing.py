"""The gateway's table: what becomes of a request for each model, and the order in which it is told.

It owns the table's numbers and the sending of it. `disposition` decides for one model, from plain
values; the router builds the whole table from the world and sends it, since it is small and a whole
table needs no catching up. The invariant: numbers grow over restarts of either side, so an older
table never replaces a newer one.
"""

from __future__ import annotations

import asyncio
import logging
import time

from daemon.control.errors import ControlError
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.state.planning import context_tokens
from daemon.control.state.records import Failure, Placement, Version
from daemon.control.state.world import World
from engine.link.errors import LinkError
from engine.link.routes import Disposition, GatewayLimits, Route, SetTable

log = logging.getLogger(__name__)


def disposition(
    serving: str,
    placement: Placement | None,
    failure: Failure | None,
    refusal: Failure | None,
    swap_on_demand: bool,
) -> tuple[Disposition, str]:
    """What to do with requests for a model, and why unless they are served.

    `serving` is the partition that serves it or empty, `failure` why it is unusable, `refusal` why
    the last attempt to bring it up failed.
    """
    if serving:
        return Disposition.SERVE, ""
    if placement is not None:
        why = "it is drained; resume it" if placement.drained else "it is being moved"
        return Disposition.HOLD, why
    for reason in (failure, refusal):
        if reason is not None:
            return Disposition.REFUSE, reason.message
    if swap_on_demand:
        return Disposition.HOLD, "it is being brought up"
    # Held all the same: a swap that somebody commands may be on its way.
    return Disposition.HOLD, "scheduling.swap_on_demand is off; load it, or swap it in"


class Router:
    """Sends the table to the gateway; `publish` whenever the world has changed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._gateway: GatewayClient | None = None
        self._version = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.enabled = False
        """Off while the daemon finds out what runs: the table in force is better than a guess."""

    def connect(self, gateway: GatewayClient | None) -> None:
        """Send to this gateway from now on; None while there is none."""
        self._gateway = gateway
        if gateway is not None:
            self._version = max(self._version, gateway.state.table_version)

    async def publish(self) -> None:
        """Send the table as it is now; returns once it is in force, or the gateway is away."""
        gateway = self._gateway
        if gateway is None or gateway.closed or not self.enabled:
            return
        # The clock keeps numbers growing when both sides start anew; the gateway's own last number
        # does when the clock was set back.
        self._version = max(self._version + 1, time.time_ns() // 1_000_000)
        try:
            await gateway.set_table(self.table(self._version))
        except (LinkError, ControlError) as error:
            # The fleet sees the same, restarts the gateway, and the whole table is sent again.
            log.warning("the gateway did not take the table: %s", error)

    def publish_soon(self) -> None:
        """Send the table without waiting for it."""
        task = asyncio.create_task(self.publish())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def table(self, version: int) -> SetTable:
        """The whole table under a number."""
        world = self._world
        defaults = {world.registry.default(name).key for name in world.registry.names()}
        return SetTable(
            version=version,
            routes=tuple(
                self._route(each, each.key in defaults) for each in world.registry.versions()
            ),
            workers=world.processes.addresses(),
            limits=GatewayLimits(
                hold_timeout_s=world.config.scheduling.hold_timeout_s,
                held_requests_max=world.config.gateway.held_requests_max,
            ),
        )

    def _route(self, version: Version, default: bool) -> Route:
        world = self._world
        serving = world.serving.get(version.key, "")
        if world.closures.tainted(serving):
            serving = ""
        chosen, reason = disposition(
            serving,
            world.placements.get(version.key),
            version.failure,
            world.refusal(version.key),
            world.config.scheduling.swap_on_demand,
        )
        return Route(
            model=version.key,
            name=version.name,
            version=version.version,
            default=default,
            directory=version.directory,
            context_tokens=(
                context_tokens(version.facts, world.config.worker) if version.facts else 0
            ),
            state=world.state(version)[0],
            disposition=chosen,
            partition=serving,
            reason=reason,
            created_s=int(version.created_s),
        )
