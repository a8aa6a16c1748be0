"""The node's own pages: liveness, readiness, metrics, and the list of models.

They answer from what the gateway knows already; only `/metrics` asks hotbayd, and goes without it
after half a second. Readiness is about the gateway as a whole: loading or losing one model never
changes it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from daemon.gateway.dispatch import Dispatcher
from daemon.gateway.errors import NotFound
from daemon.gateway.metrics import CONTENT_TYPE, GatewayMetrics, render
from daemon.gateway.web.exchange import Exchange
from engine.link.routes import Route

MODELS_PATH = "/v1/models/"


def unready_reason(dispatcher: Dispatcher) -> str:
    """Why the gateway should get no traffic, or nothing when it should."""
    if dispatcher.draining:
        return "shutting down"
    table = dispatcher.table
    if not table.received:
        return "waiting for hotbayd's first table of routes"
    if table.workers and not dispatcher.workers.connected():
        return f"none of the {len(table.workers)} workers can be reached"
    return ""


class Pages:
    """Handlers of the pages."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        query_control: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._query_control = query_control

    async def live(self, exchange: Exchange) -> None:
        """200 for as long as the event loop turns."""
        await exchange.answer(200, b'{"status":"live"}')

    async def ready(self, exchange: Exchange) -> None:
        """200 when traffic is welcome, else 503 with the reason."""
        reason = unready_reason(self._dispatcher)
        if reason:
            body = msgspec.json.encode({"status": "not ready", "reason": reason})
            await exchange.answer(503, body, (b"retry-after", b"1"))
        else:
            await exchange.answer(200, b'{"status":"ready"}')

    async def metrics(self, exchange: Exchange) -> None:
        """The whole node's metrics in Prometheus' text format."""
        body = render(self._metrics, await self._query_control())
        await exchange.answer(200, body, content_type=(b"content-type", CONTENT_TYPE))

    async def models(self, exchange: Exchange) -> None:
        """Every version of every model."""
        routes = sorted(
            self._dispatcher.table.by_key.values(), key=lambda route: (route.name, route.version)
        )
        body = {"object": "list", "data": [model_object(route) for route in routes]}
        await exchange.answer(200, msgspec.json.encode(body))

    async def model(self, exchange: Exchange) -> None:
        """One model, by `name` or `name@version`."""
        name = exchange.path.removeprefix(MODELS_PATH)
        route = self._dispatcher.table.resolve(name)
        if route is None:
            raise model_unknown(name)
        await exchange.answer(200, msgspec.json.encode(model_object(route)))


def model_unknown(name: str) -> NotFound:
    """The answer to a model that is not registered."""
    return NotFound(
        f"the model {name[:200]!r} does not exist; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )


def model_object(route: Route) -> dict[str, Any]:
    """A model in OpenAI's shape, with where it stands; a default version goes by the name."""
    return {
        "id": route.name if route.default else route.model,
        "object": "model",
        "created": route.created_s,
        "owned_by": "hotbay",
        "root": route.model,
        "version": route.version,
        "state": route.state,
        "reason": route.reason,
        "max_model_len": route.context_tokens,
    }
