"""hotbay.v1.NodeService and PartitionService: what this host has, and how it is."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from hotbay.v1 import node_pb2, partition_pb2

from daemon.control.actions.conductor import Conductor
from daemon.control.actions.cordons import Cordons
from daemon.control.actions.layout_changes import LayoutChanges
from daemon.control.actions.layouts import Layouts
from daemon.control.errors import Refused
from daemon.control.notify import boot_id
from daemon.control.services import answers, requests, views
from daemon.control.services.answers import timestamp
from daemon.control.state.operations import Operations
from daemon.control.state.records import Intent, Kind
from daemon.control.state.world import World
from partitioner.gpu import Gpu, GpuHealth


class NodeService:
    """`discover` reads the GPUs again; `addresses` is where the gateway listens, HTTP and gRPC."""

    def __init__(
        self,
        world: World,
        operations: Operations,
        conductor: Conductor,
        version: str,
        discover: Callable[[], Awaitable[tuple[Gpu, ...]]],
        addresses: Callable[[], tuple[str, str]],
        cordons: Cordons,
    ) -> None:
        self._world = world
        self._operations = operations
        self._conductor = conductor
        self._version = version
        self._discover = discover
        self._addresses = addresses
        self._cordons = cordons
        self._started_s = time.time()

    async def GetNode(self, request: node_pb2.GetNodeRequest) -> node_pb2.Node:
        world = self._world
        # Empty until recovery is through: whoever waits for an address waits for a ready node.
        http, grpc_address = self._addresses() if world.ready else ("", "")
        return node_pb2.Node(
            hostname=socket.gethostname(),
            version=self._version,
            boot_id=boot_id(),
            start_time=timestamp(self._started_s),
            simulated=bool(world.config.node.simulate),
            driver_version=next((gpu.driver_version for gpu in world.gpus), ""),
            host_store=views.host_store(world),
            processes=[views.process(each) for each in world.processes.processes()],
            http_address=http,
            grpc_address=grpc_address,
            warnings=[
                *world.warnings,
                *self._troubles(),
                *world.health.warnings(world.gpus),
            ],
            operations_running=self._operations.open_count,
        )

    def _troubles(self) -> list[str]:
        """Partitions that do not work, and why."""
        world = self._world
        reasons = {each: world.processes.failure(each) for each in world.partitions}
        return [f"the worker of {each} is not up: {why}" for each, why in reasons.items() if why]

    async def ListGpus(self, request: node_pb2.ListGpusRequest) -> node_pb2.ListGpusResponse:
        self._world.gpus = await self._discover()
        lost = [gpu for gpu in self._world.gpus if gpu.health is not GpuHealth.OK]
        return node_pb2.ListGpusResponse(
            gpus=[views.gpu(self._world, gpu) for gpu in self._world.gpus],
            unreachable=[gpu.uuid for gpu in lost if gpu.uuid],
        )

    async def CordonGpu(self, request: node_pb2.CordonGpuRequest) -> node_pb2.Gpu:
        await self._conductor.admit()
        gpu = await self._cordons.cordon(
            requests.identity("CordonGpu", request),
            requests.required("gpu", request.gpu),
            requests.short("reason", request.reason),
            only_check=request.validate_only,
        )
        return views.gpu(self._world, gpu)

    async def UncordonGpu(self, request: node_pb2.UncordonGpuRequest) -> node_pb2.Gpu:
        await self._conductor.admit()
        gpu = await self._cordons.uncordon(
            requests.identity("UncordonGpu", request),
            requests.required("gpu", request.gpu),
            only_check=request.validate_only,
        )
        return views.gpu(self._world, gpu)

    async def Calibrate(self, request: node_pb2.CalibrateRequest) -> Any:
        operation = await self._conductor.submit(
            requests.identity("Calibrate", request),
            Intent(Kind.CALIBRATE, partition=request.partition),
            validate_only=request.validate_only,
        )
        return answers.operation(operation)


class PartitionService:
    """What the partitions are and hold, could be, and are made to be."""

    def __init__(
        self, world: World, operations: Operations, layouts: Layouts, changes: LayoutChanges
    ) -> None:
        self._world = world
        self._operations = operations
        self._layouts = layouts
        self._changes = changes

    async def ListPartitions(
        self, request: partition_pb2.ListPartitionsRequest
    ) -> partition_pb2.ListPartitionsResponse:
        ids, token = requests.page(
            list(self._world.partitions), str, request.page_size, request.page_token
        )
        await self._refresh(ids)
        return partition_pb2.ListPartitionsResponse(
            partitions=[self._partition(each) for each in ids], next_page_token=token
        )

    async def GetPartition(
        self, request: partition_pb2.GetPartitionRequest
    ) -> partition_pb2.Partition:
        if request.id not in self._world.partitions:
            raise Refused(
                f"there is no partition {request.id!r}; there are "
                f"{', '.join(self._world.partitions)}",
                reason="PARTITION_NOT_FOUND",
                metadata={"partition": request.id},
            )
        await self._refresh([request.id])
        return self._partition(request.id)

    async def PlanLayout(
        self, request: partition_pb2.PlanLayoutRequest
    ) -> partition_pb2.LayoutPlan:
        text = requests.required("layout", request.layout)
        return await self._layouts.plan(text, request.source)

    async def ApplyLayout(self, request: partition_pb2.ApplyLayoutRequest) -> Any:
        plan_id = requests.required("plan_id", request.plan_id)
        operation = await self._changes.apply(
            requests.identity("ApplyLayout", request),
            plan_id,
            validate_only=request.validate_only,
            force=request.force,
            end_pids=tuple(request.end_pids),
        )
        return answers.operation(operation)

    async def ListProfiles(
        self, request: partition_pb2.ListProfilesRequest
    ) -> partition_pb2.ListProfilesResponse:
        return partition_pb2.ListProfilesResponse(gpus=await self._layouts.profiles())

    async def GetLayout(self, request: partition_pb2.GetLayoutRequest) -> partition_pb2.Layout:
        return partition_pb2.Layout(text=await self._layouts.export())

    async def _refresh(self, partitions: list[str]) -> None:
        """Ask workers how they are now: what they report by themselves is up to a second old."""
        workers = self._world.processes.workers
        asked = [workers[each].describe() for each in partitions if each in workers]
        # One that does not answer is shown as it last was; the fleet sees to it.
        await asyncio.gather(*asked, return_exceptions=True)

    def _partition(self, each: str) -> partition_pb2.Partition:
        holder = self._operations.holder(f"partition:{each}")
        return views.partition(self._world, self._world.partitions[each], holder)
