"""The gateway process, put together: sockets, handlers, links, and how it ends.

It owns the order of starting and stopping and nothing else. Starting takes the runtime directory's
lock, then the ports, then listens for hotbayd; stopping first turns traffic away while open
requests end, then ends the rest with an error, then closes. hotbayd's going away is no event here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from daemon.gateway.config import GatewayConfig
from daemon.gateway.control import ControlListener
from daemon.gateway.custody import Custody
from daemon.gateway.demand import DemandReporter
from daemon.gateway.dispatch import Dispatcher
from daemon.gateway.errors import Unavailable
from daemon.gateway.health import HealthServer
from daemon.gateway.listening import Address, listen, lock
from daemon.gateway.metrics import GatewayMetrics
from daemon.gateway.openai.serve import Completions
from daemon.gateway.table import Table
from daemon.gateway.tokens.tokenizer import TokenizerCache
from daemon.gateway.web.app import App
from daemon.gateway.web.pages import MODELS_PATH, Pages, unready_reason
from engine.link.routes import PROTOCOL, GatewayState

CLOSE_TIMEOUT_S = 2
"""How long connections are given to close once every answer is out, in whole seconds."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process has one way to end, and it is not theirs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """One gateway in `runtime_dir`. `run` returns when it has been told to end and has."""

    def __init__(
        self, runtime_dir: Path, http: Address, grpc: Address, config: GatewayConfig
    ) -> None:
        self._directory = runtime_dir / "gateway"
        self._http = http
        self._grpc = grpc
        self._config = config
        self._stopping = asyncio.Event()
        self._drain_timeout_s = config.drain_timeout_s
        self._metrics = GatewayMetrics()
        self._custody = Custody(config.segments_max)
        self._tokenizers = TokenizerCache(config.tokenizers_max)
        self._dispatcher = Dispatcher(self._metrics, self._changed)
        self._health = HealthServer(lambda: not unready_reason(self._dispatcher))
        self._demand: DemandReporter | None = None
        self._preloading: asyncio.Task[None] | None = None
        self._boot_id = BOOT_ID.read_text().strip()

    def stop(self, drain_timeout_s: float | None = None) -> None:
        """Begin to end: open requests get `drain_timeout_s`, by default the configured time."""
        if drain_timeout_s is not None:
            self._drain_timeout_s = drain_timeout_s
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped. Raises StartFailed when it cannot begin."""
        held = lock(self._directory)
        try:
            sock = listen(self._http)
            self._http = Address(self._http.host, sock.getsockname()[1])
            self._grpc = await self._health.start(self._grpc)
            await self._serve(sock)
        finally:
            await self._health.stop()
            self._custody.close()
            os.close(held)

    async def _serve(self, sock: socket.socket) -> None:
        control = ControlListener(
            self._directory / "control.sock",
            self._custody,
            describe=self._state,
            set_table=self._set_table,
            shutdown=self.stop,
            connected=lambda: self._demand.reconnected() if self._demand else None,
        )
        self._demand = DemandReporter(self._dispatcher.unfinished.demand, control.post_demand)
        completions = Completions(self._dispatcher, self._tokenizers, self._metrics, self._config)
        server = _HttpServer(self._http_config(control, completions))
        self._gauges(server)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(control.run(), name="control"),
                tasks.create_task(self._demand.run(), name="demand"),
                tasks.create_task(self._health.run(), name="health"),
            ]
            tasks.create_task(server.serve(sockets=[sock]), name="http")
            log.info("serving HTTP on %s and gRPC on %s", self._http, self._grpc)
            await self._stopping.wait()
            await self._drain(completions)
            server.should_exit = True
            for task in background:
                task.cancel()
            await self._dispatcher.workers.close()
            await control.close()
        log.info("ended")

    async def _drain(self, completions: Completions) -> None:
        """Turn new requests away, wait for open ones, end the rest."""
        self._dispatcher.draining = True
        self._changed()
        log.info(
            "shutting down: %d streams have %g s to end",
            len(self._dispatcher.unfinished),
            self._drain_timeout_s,
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                await completions.idle.wait()
        self._dispatcher.fail_all(
            Unavailable("the gateway is shutting down", code="draining", retry_after_s=1)
        )

    def _http_config(self, control: ControlListener, completions: Completions) -> uvicorn.Config:
        pages = Pages(self._dispatcher, self._metrics, control.query_metrics)
        app = App(
            {
                "/v1/chat/completions": {"POST": completions.chat},
                "/v1/completions": {"POST": completions.completions},
                "/v1/models": {"GET": pages.models},
                MODELS_PATH: {"GET": pages.model},
                "/livez": {"GET": pages.live},
                "/readyz": {"GET": pages.ready},
                "/metrics": {"GET": pages.metrics},
            },
            self._metrics,
        )
        return uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=self._config.keep_alive_timeout_s,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )

    def _set_table(self, table: Table) -> None:
        self._dispatcher.set_table(table)
        if self._preloading is None or self._preloading.done():
            routes = tuple(table.by_key.values())
            self._preloading = asyncio.create_task(self._tokenizers.preload(routes))

    def _changed(self) -> None:
        self._health.changed()
        if self._demand is not None:
            self._demand.changed()

    def _state(self) -> GatewayState:
        return GatewayState(
            call=0,
            protocol=PROTOCOL,
            pid=os.getpid(),
            boot_id=self._boot_id,
            generation=self._config.generation,
            table_version=self._dispatcher.table.version,
            http=str(self._http),
            grpc=str(self._grpc),
            segments=self._custody.digests,
        )

    def _gauges(self, server: uvicorn.Server) -> None:
        dispatcher = self._dispatcher
        self._metrics.gauges |= {
            "hotbay_open_connections": (
                "HTTP connections of clients.",
                lambda: len(server.server_state.connections),
            ),
            "hotbay_held_requests": (
                "Requests waiting here for their model.",
                lambda: dispatcher.held,
            ),
            "hotbay_unfinished_requests": (
                "Sequences held or at a worker.",
                lambda: len(dispatcher.unfinished),
            ),
            "hotbay_worker_links": (
                "Workers this gateway is connected to.",
                dispatcher.workers.connected,
            ),
            "hotbay_table_version": (
                "The table of routes in force.",
                lambda: dispatcher.table.version,
            ),
            "hotbay_segments_kept": (
                "Image segments whose descriptor is kept here.",
                lambda: len(self._custody.digests),
            ),
        }
