"""The routing table: which model a request means, and what is done with it.

A `Table` is a frozen view of the last `SetTable`; the module looks names up and decides nothing
more. Invariant: a request keeps the key it was resolved to, whatever later tables say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.link.routes import Disposition, GatewayLimits, Route, SetTable, WorkerAddress

LIMITS_UNTIL_TOLD = GatewayLimits(hold_timeout_s=60.0, held_requests_max=1024)


@dataclass(frozen=True)
class Table:
    """All routes, by key (`name@version`) and by the names that mean a default version."""

    version: int = -1
    by_key: Mapping[str, Route] = field(default_factory=dict)
    default_key: Mapping[str, str] = field(default_factory=dict)
    workers: Mapping[str, WorkerAddress] = field(default_factory=dict)
    limits: GatewayLimits = LIMITS_UNTIL_TOLD

    @property
    def received(self) -> bool:
        """Whether hotbayd has sent any table yet."""
        return self.version >= 0

    def resolve(self, name: str) -> Route | None:
        """The route that `name` or `name@version` means, or None."""
        return self.by_key.get(self.default_key.get(name, name))

    def serves(self, key: str) -> bool:
        """Whether requests for this key go to a worker now."""
        route = self.by_key.get(key)
        return route is not None and route.disposition is Disposition.SERVE


def build_table(message: SetTable) -> Table:
    """The table that a message describes. Where two versions claim the name, the higher has it."""
    by_key = {route.model: route for route in message.routes}
    defaults: dict[str, Route] = {}
    for route in message.routes:
        if route.default:
            other = defaults.get(route.name)
            if other is None or other.version < route.version:
                defaults[route.name] = route
    return Table(
        version=message.version,
        by_key=MappingProxyType(by_key),
        default_key=MappingProxyType({name: route.model for name, route in defaults.items()}),
        workers=MappingProxyType({worker.partition: worker for worker in message.workers}),
        limits=message.limits,
    )
