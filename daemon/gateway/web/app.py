"""The ASGI application: finds the handler of a path, answers errors, counts requests.

Handlers raise RequestFailed for whatever the client should hear; anything else that escapes one is
a bug, is logged, and becomes a 500 in the same shape. Invariant: each request is counted once, with
the status it was answered with.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from daemon.gateway.errors import ClientGone, MethodNotAllowed, NotFound, RequestFailed
from daemon.gateway.metrics import GatewayMetrics
from daemon.gateway.web.exchange import Exchange, Receive, Send

Handler = Callable[[Exchange], Awaitable[None]]

log = logging.getLogger(__name__)


class App:
    """`routes` maps a path to its handlers by method; a path that ends in / serves all below it."""

    def __init__(
        self, routes: Mapping[str, Mapping[str, Handler]], metrics: GatewayMetrics
    ) -> None:
        self._routes = routes
        self._metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        self._metrics.open_requests += 1
        try:
            await self._answer(exchange)
        finally:
            self._metrics.open_requests -= 1
            self._metrics.requests[exchange.model, str(exchange.status)] += 1

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._find(exchange)(exchange)
        except ClientGone as error:
            self._metrics.cancelled_requests += 1
            if not exchange.started:
                exchange.status = error.status
        except RequestFailed as error:
            if exchange.started:
                raise
            await exchange.fail(error)
        except Exception:
            log.exception("request %s failed", exchange.request_id.decode())
            if exchange.started:
                raise
            await exchange.fail(RequestFailed("the gateway failed; its log has the details"))

    def _find(self, exchange: Exchange) -> Handler:
        path = exchange.path
        methods = self._routes.get(path)
        if methods is None:
            below = [root for root in self._routes if root.endswith("/") and path.startswith(root)]
            if not below:
                raise NotFound(f"there is no path {path[:200]} here")
            methods = self._routes[max(below, key=len)]
        method = "GET" if exchange.method == "HEAD" else exchange.method
        handler = methods.get(method)
        if handler is None:
            allowed = ", ".join(methods)
            raise MethodNotAllowed(f"{exchange.method} does not go with this path; use {allowed}")
        return handler
