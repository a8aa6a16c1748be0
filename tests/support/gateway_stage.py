"""A gateway process on a stage: scripted workers and a scripted hotbayd around the real thing.

The scripted parts run on an event loop in a thread of the test's process, the gateway is a process
of its own with real sockets. Tests talk to it as clients do, over HTTP, and wait for facts with
`until`, never for time to pass.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx

from engine.link.errors import LinkError
from engine.link.peer import Peer
from engine.link.routes import (
    Demand,
    Describe,
    Disposition,
    Done,
    Failed,
    FromGateway,
    GatewayLimits,
    GatewayState,
    Metrics,
    MetricsQuery,
    Route,
    SetTable,
    WorkerAddress,
)
from tests.support.scripted_worker import Script, ScriptedWorker

Result = TypeVar("Result")
START_TIMEOUT_S = 120.0
FACT_TIMEOUT_S = 120.0
ROOT = Path(__file__).resolve().parents[2]


def until(fact: Callable[[], Any], what: str, timeout_s: float = FACT_TIMEOUT_S) -> Any:
    """Wait until `fact` gives something true, and return that."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        found = fact()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


class ScriptedDaemon:
    """hotbayd's end of the control link."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.demands: list[Demand] = []
        self.metrics_text: str | None = "# TYPE hotbay_swaps_total counter\nhotbay_swaps_total 7\n"
        self.closed = False
        self.peer: Peer[Any] | None = None

    async def connect(self) -> None:
        """Connect, replacing whoever was connected before."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(self._path))

        def closed(_: LinkError) -> None:
            self.closed = True

        async def handle(message: Any, _: list[int]) -> None:
            if isinstance(message, Demand):
                self.demands.append(message)
            elif isinstance(message, MetricsQuery) and self.metrics_text is not None:
                assert self.peer is not None
                self.peer.post(Metrics(message.call, self.metrics_text))

        self.peer = Peer(
            sock,
            FromGateway,
            name="gateway",
            replies=(Done, Failed, GatewayState),
            handler=handle,
            on_close=closed,
        )

    async def ask(self, message: Any, *descriptors: int) -> Any:
        """Call, and the reply with its descriptors if it has any."""
        assert self.peer is not None
        reply, attached = await self.peer.call(message, descriptors, timeout_s=60)
        return (reply, attached) if attached else reply

    async def leave(self) -> None:
        """Go away, as a killed hotbayd does."""
        if self.peer is not None:
            await self.peer.close()
            self.peer = None


class GatewayStage:
    """Everything around one gateway process. Use as a context manager."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.directory = directory
        self.config = {"generation": 3, **config}
        self.loop = asyncio.new_event_loop()
        self.workers: dict[str, ScriptedWorker] = {}
        self._started_workers: list[ScriptedWorker] = []
        self.daemon = ScriptedDaemon(directory / "gateway" / "control.sock")
        self.limits = GatewayLimits(hold_timeout_s=30.0, held_requests_max=64)
        self.routes: dict[str, Route] = {}
        self.addresses: dict[str, WorkerAddress] = {}
        self.version = 0
        self.http = ""
        self.grpc = ""
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._log = directory / "gateway.log"

    def __enter__(self) -> GatewayStage:
        self._thread.start()
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        for worker in self._started_workers:
            self.do(worker.stop())
        self.do(self.daemon.leave())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _begin(self) -> None:
        self.process = self.start_process()
        until(self._started, "the gateway listens", START_TIMEOUT_S)
        self.do(self.daemon.connect())
        state = self.ask(Describe())
        self.http, self.grpc = f"http://{state.http}", state.grpc
        self.client = httpx.Client(base_url=self.http, timeout=100)

    def kill_and_start_again(self) -> None:
        """Kill the process and start the next one in its directory, on ports of its own."""
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.do(self.daemon.leave())
        self._log.unlink()
        self._begin()

    def start_process(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A gateway process; its log goes to a file."""
        command = [sys.executable, "-m", "daemon.gateway.main"]
        command += ["--runtime-dir", str(self.directory)]
        command += arguments or ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
        command += ["--config-json", json.dumps(self.config)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
        with self._log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, stdout=log)

    def _started(self) -> bool:
        assert self.process.poll() is None, self.log()
        return "serving HTTP" in self.log()

    def log(self) -> str:
        """What the process has logged."""
        return self._log.read_text() if self._log.exists() else ""

    def do(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the stage's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(START_TIMEOUT_S)

    def ask(self, message: Any, *descriptors: int) -> Any:
        """Ask the gateway as hotbayd."""
        return self.do(self.daemon.ask(message, *descriptors))

    def worker(self, partition: str, script: Callable[[Any], Script]) -> ScriptedWorker:
        """Start a scripted worker for a partition; the next table has it."""
        path = self.directory / "workers" / partition / "tokens.sock"
        worker = ScriptedWorker(path, script)
        self.do(worker.start())
        self._started_workers.append(worker)
        self.workers[partition] = worker
        generation = self.addresses[partition].generation + 1 if partition in self.addresses else 1
        self.addresses[partition] = WorkerAddress(partition, str(path), generation)
        return worker

    def route(self, model: str, directory: Path, **changes: Any) -> None:
        """Add or change a route; the next table has it."""
        name, _, version = model.partition("@")
        values: dict[str, Any] = {
            "model": model,
            "name": name,
            "version": int(version),
            "default": True,
            "directory": str(directory),
            "context_tokens": 256,
            "state": "ACTIVE",
            "disposition": Disposition.SERVE,
            "partition": "gpu0",
            "created_s": 1_700_000_000,
        }
        self.routes[model] = Route(**{**values, **changes})

    def send_table(self, **limits: Any) -> None:
        """Send the table to the gateway and wait until it is in force."""
        if limits:
            self.limits = GatewayLimits(
                **{
                    "hold_timeout_s": self.limits.hold_timeout_s,
                    "held_requests_max": self.limits.held_requests_max,
                    **limits,
                }
            )
        self.version += 1
        table = SetTable(
            version=self.version,
            routes=tuple(self.routes.values()),
            workers=tuple(self.addresses.values()),
            limits=self.limits,
        )
        assert isinstance(self.ask(table), Done)

    def connected(self) -> None:
        """Wait until every worker of the table is linked."""
        until(
            lambda: self.gauge("hotbay_worker_links") == len(self.addresses), "workers are linked"
        )

    def gauge(self, name: str) -> float:
        """A metric without labels from /metrics."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Send the process a signal."""
        self.process.send_signal(number)
