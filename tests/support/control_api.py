"""Calls of the control API over its real socket, to a whole node with scripted peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hotbay.reasons import DOMAIN
from hotbay.v1 import (
    model_pb2,
)

from tests.support.control_stage import Theatre, staged

QUIET = "[scheduling]\nmin_residency_s = 3600\n"


class Api:
    """Calls by full name; errors come as (code, reason, metadata, message)."""

    def __init__(self, stage: Theatre, channel: grpc.aio.Channel) -> None:
        self.stage = stage
        self.channel = channel
        self.timeout_s = 120.0

    async def call(self, method: str, request: Any, answer: Any) -> Any:
        call = self.channel.unary_unary(
            f"/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return await call(request, timeout=self.timeout_s)

    async def model(self, method: str, answer: Any = longrunning.Operation, **fields: Any) -> Any:
        request = getattr(model_pb2, f"{method}Request")(**fields)
        return await self.call(f"hotbay.v1.ModelService/{method}", request, answer)

    async def operation(
        self, method: str, answer: Any = longrunning.Operation, **fields: Any
    ) -> Any:
        request = getattr(longrunning, f"{method}Request")(**fields)
        return await self.call(f"google.longrunning.Operations/{method}", request, answer)

    async def wait(self, operation: Any) -> Any:
        return await self.operation("WaitOperation", name=operation.name)


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, str], str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == DOMAIN
    return caught.value.code(), info.reason, dict(info.metadata), status.message


def play(root: Path, scenario: Callable[[Api], Awaitable[None]], *models: str) -> None:
    async def run() -> None:
        async with staged(root, *models, settings=QUIET) as stage, asyncio.timeout(120):
            path = stage.config().control_socket
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                await scenario(Api(stage, channel))

    asyncio.run(run())
