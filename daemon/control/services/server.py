"""The gRPC server on the control socket: methods by descriptor, errors in one shape.

It owns the socket and the mapping of errors. Methods are found by name on the objects that
implement services; one that is not there answers UNIMPLEMENTED with a reason, so that the whole of
the API is always listed. The socket is this user's alone, and an old one is removed only because
the caller holds the directory's lock: gRPC would silently take a live one over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from daemon.control.errors import ControlError, Refused
from daemon.control.services.answers import status
from daemon.control.state.failures import failure_of
from engine.link.directories import SOCKET_PATH_BYTES_MAX
from engine.link.errors import LinkError
from swap.errors import SwapError

STOP_GRACE_S = 1.0

log = logging.getLogger(__name__)


class Server:
    """The control API's server; see `start`."""

    def __init__(
        self,
        path: Path,
        services: Mapping[ServiceDescriptor, object | None],
        request_bytes_max: int,
    ) -> None:
        if len(str(path).encode()) > SOCKET_PATH_BYTES_MAX:
            raise ControlError(
                f"{path} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the longest path of a Unix "
                "socket: use a shorter --runtime-dir",
                reason="INVALID_ARGUMENT",
            )
        self.path = path
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", request_bytes_max),
                ("grpc.so_reuseport", 0),
            )
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = [service.full_name for service in services]
        for service, implementation in services.items():
            handlers = {
                method.name: _handler(method, getattr(implementation, method.name, None))
                for method in service.methods
            }
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service.full_name, handlers),)
            )
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    async def start(self) -> None:
        """Listen. Until `set_serving` the health service says NOT_SERVING."""
        await self.set_serving(False)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()
        self.path.chmod(0o600)

    async def set_serving(self, serving: bool) -> None:
        """What the health service says of the daemon and of each service."""
        verdict = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, verdict)

    async def stop(self) -> None:
        """Take no new calls, give open ones a moment, and remove the socket."""
        await self._server.stop(STOP_GRACE_S)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _handler(
    method: MethodDescriptor, implementation: Callable[..., Any] | None
) -> grpc.RpcMethodHandler:
    request_class = GetMessageClass(method.input_type)
    answer_class = GetMessageClass(method.output_type)
    name = f"{method.containing_service.name}.{method.name}"

    async def missing(request: Any) -> Any:
        raise Refused(
            f"{name} is not implemented by this version of hotbayd",
            reason="NOT_IMPLEMENTED",
            metadata={"method": name},
        )

    async def missing_stream(request: Any) -> AsyncGenerator[Any, None]:
        await missing(request)
        yield

    make = grpc.unary_unary_rpc_method_handler
    behaviour: Any = _unary(name, implementation or missing)
    if method.server_streaming:
        make = grpc.unary_stream_rpc_method_handler
        behaviour = _stream(name, implementation or missing_stream)
    return make(
        behaviour,
        request_deserializer=request_class.FromString,
        response_serializer=answer_class.SerializeToString,
    )


def _unary(name: str, implementation: Callable[[Any], Awaitable[Any]]) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await implementation(request)
        except Exception as error:  # the boundary: every error becomes a status with a reason
            await _abort(name, error, context)

    return call


def _stream(name: str, implementation: Callable[[Any], AsyncGenerator[Any, None]]) -> Any:
    async def call(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[Any, None]:
        try:
            async with contextlib.aclosing(implementation(request)) as answers:
                async for answer in answers:
                    yield answer
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # the boundary, as above
            await _abort(name, error, context)

    return call


async def _abort(name: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if not isinstance(error, ControlError | SwapError | LinkError):
        log.exception("%s failed", name)
    await context.abort_with_status(rpc_status.to_status(status(failure_of(error))))
