"""The inference gRPC port: health and reflection.

The service whose health is asked for is the whole gateway (the empty name); it is SERVING exactly
when `/readyz` answers 200. The port is refused rather than shared: by default a second gRPC server
would silently take half of the connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from daemon.gateway.errors import AddressTaken
from daemon.gateway.listening import Address

MESSAGE_BYTES_MAX = 16 << 20


class HealthServer:
    """A gRPC server with the health service; `ready` says how it is."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._changed = asyncio.Event()
        self._servicer = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((name, reflection.SERVICE_NAME), self._server)

    async def start(self, address: Address) -> Address:
        """Listen; the address with the port that was taken. Raises AddressTaken."""
        try:
            bound: int = self._server.add_insecure_port(str(address))
        except RuntimeError as error:
            bound, reason = 0, f": {error}"
        else:
            reason = ""
        if bound == 0:
            raise AddressTaken(f"cannot listen for gRPC on {address}{reason}; give another --grpc")
        await self._set()
        await self._server.start()
        return Address(address.host, bound)

    def changed(self) -> None:
        """Readiness may have changed; cheap."""
        self._changed.set()

    async def run(self) -> None:
        """Publish changes for as long as the task lives."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._set()

    async def _set(self) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._servicer.set("", status.SERVING if self._ready() else status.NOT_SERVING)

    async def stop(self) -> None:
        """Say NOT_SERVING, then close."""
        await self._servicer.enter_graceful_shutdown()
        await self._server.stop(grace=0.5)
