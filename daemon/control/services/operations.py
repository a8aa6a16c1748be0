"""google.longrunning.Operations and hotbay.v1.WatchService: what is under way, and what changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from google.longrunning import operations_proto_pb2 as longrunning
from google.protobuf.empty_pb2 import Empty
from hotbay.v1 import watch_pb2

from daemon.control.services import answers, requests
from daemon.control.services.watch import Hub
from daemon.control.state.operations import Operations

WAIT_S_MAX = 3600.0
FILTERS = {"": None, "done=true": True, "done=false": False}


class OperationsService:
    """The five standard methods."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def GetOperation(self, request: Any) -> Any:
        return answers.operation(self._operations.get(request.name))

    async def ListOperations(self, request: Any) -> Any:
        wanted = request.filter.replace(" ", "")
        if wanted not in FILTERS:
            raise requests.invalid(
                "filter", f"filter {request.filter!r} is not known: use done=true or done=false"
            )
        done = FILTERS[wanted]
        records = [each for each in self._operations.all() if done is None or each.done is done]
        found, token = requests.page(
            records, lambda each: each.name, request.page_size, request.page_token
        )
        return longrunning.ListOperationsResponse(
            operations=[answers.operation(each) for each in found], next_page_token=token
        )

    async def CancelOperation(self, request: Any) -> Empty:
        await self._operations.cancel(request.name)
        return Empty()

    async def DeleteOperation(self, request: Any) -> Empty:
        await self._operations.delete(request.name)
        return Empty()

    async def WaitOperation(self, request: Any) -> Any:
        limit_s = requests.timeout_s("timeout", request, WAIT_S_MAX)
        record = await self._operations.wait(request.name, min(limit_s, WAIT_S_MAX))
        return answers.operation(record)


class WatchService:
    """The one stream of everything that changes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def Watch(self, request: watch_pb2.WatchRequest) -> AsyncGenerator[watch_pb2.WatchEvent, None]:
        return self._hub.watch(request.resume_token, request.kinds)
