"""A node that answers as it was told: the services of the control API over a real Unix socket.

It is a real grpc server, so that clients are tested over the real wire, with a model of a node just
large enough to give sensible answers: models with a state, one partition, operations that end at
once, on release, or with an error. It never decides anything a daemon would; what a test wants to
see, the test says. Every request is kept in `requests`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_proto_pb2 import ListOperationsResponse, Operation
from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hotbay.reasons import DOMAIN, Reason
from hotbay.v1 import (
    common_pb2,
    doctor_pb2,
    doctor_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    partition_pb2,
    partition_pb2_grpc,
    placement_pb2,
    placement_pb2_grpc,
    simulation_pb2,
    simulation_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)

PARTITION = "gpu0"
GIB = 1 << 30


@dataclass(frozen=True)
class Refusal:
    """An error to answer with."""

    reason: Reason
    message: str
    metadata: dict[str, str] = field(default_factory=dict)

    def status(self) -> status_pb2.Status:
        info = error_details_pb2.ErrorInfo(
            reason=self.reason.value, domain=DOMAIN, metadata=self.metadata
        )
        detail = any_pb2.Any()
        detail.Pack(info)
        return status_pb2.Status(code=int(self.reason.code), message=self.message, details=[detail])


def packed(message: Message) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(message)
    return box


def version(name: str, state: int, number: int = 1, partition: str = "") -> model_pb2.ModelVersion:
    return model_pb2.ModelVersion(
        version=number, key=f"{name}@{number}", directory=f"/models/{name}", state=state,
        partition=partition, family="llama", parameters=28_300_000, layers=8, vocabulary=4096,
        context_tokens=2048, checkpoint_bytes=GIB, image_bytes=GIB, weights_bytes=GIB,
        kv_bytes_per_token=4096, digest="sha256:00",
    )  # fmt: skip


class ScriptedNode:
    """Start it on a socket; change its attributes to say what it is to answer."""

    def __init__(self, socket: Path, http_address: str = "") -> None:
        self.socket = socket
        self.endpoint = f"unix:{socket}"
        self.requests: list[Message] = []
        # The names of the methods called, in order.
        self.calls: list[str] = []
        # By method name: refuse every call of it.
        self.refusals: dict[str, Refusal] = {}
        # How operations end: None well, a Refusal with it, and at which stage.
        self.outcome: Refusal | None = None
        self.end_stage = model_pb2.OPERATION_STAGE_COMMITTED
        # What a dry run of a swap finds wrong.
        self.plan_error: Refusal | None = None
        # Whether operations end at once, or when `release` is called.
        self.held = False
        self.response_state = common_pb2.MODEL_STATE_ACTIVE
        # What each Watch call sends, in order; a Refusal ends the call with it.
        self.watches: list[list[watch_pb2.WatchEvent | Refusal]] = []
        self.endless_watches = True
        self.operations: dict[str, Operation] = {}
        self.changed = threading.Condition()
        self.page_size_max = 1000
        self.models = {
            "prose": model_pb2.Model(
                name="prose", default_version=1, labels={"production": 1},
                versions=[version("prose", common_pb2.MODEL_STATE_ACTIVE, partition=PARTITION)],
            ),
            "code": model_pb2.Model(
                name="code", default_version=1,
                versions=[version("code", common_pb2.MODEL_STATE_STANDBY)],
            ),
        }  # fmt: skip
        self.node = node_pb2.Node(
            hostname="testhost", version="9.9.9", simulated=True, driver_version="999.0",
            host_store=node_pb2.HostStore(budget_bytes=16 * GIB, used_bytes=2 * GIB),
            http_address=http_address, grpc_address="127.0.0.1:8001",
        )  # fmt: skip
        self.gpus = node_pb2.ListGpusResponse(
            gpus=[
                node_pb2.Gpu(uuid="GPU-0", product="H200", memory_bytes=141 * GIB, health="ok",
                             mig_capable=True)
            ]
        )  # fmt: skip
        self.partitions = [
            partition_pb2.Partition(
                id=PARTITION, kind=partition_pb2.PARTITION_KIND_WHOLE, gpu="GPU-0",
                memory_bytes=2 * GIB, memory_free_bytes=GIB,
                health=partition_pb2.PARTITION_HEALTH_READY,
                models=[partition_pb2.Residence(
                    model="prose@1", state=common_pb2.MODEL_STATE_ACTIVE, weights_bytes=GIB,
                    kv_bytes=GIB // 2, kv_used_bytes=GIB // 8, running=3, waiting=1)],
            )
        ]  # fmt: skip
        self.layout_plan = partition_pb2.LayoutPlan(plan_id="plan-0")
        self.placement = placement_pb2.PlacementPlan()
        self.defragmentation = placement_pb2.DefragmentationPlan()
        self.examination = doctor_pb2.Examination()
        self.phases_ms: dict[str, float] = {}
        # Whom forcing a layout ends.
        self.ended: list[partition_pb2.ForeignProcess] = []
        self.profiles = partition_pb2.ListProfilesResponse()
        self._server: Any = None

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
        node_pb2_grpc.add_NodeServiceServicer_to_server(NodeAnswers(self), self._server)
        doctor_pb2_grpc.add_DoctorServiceServicer_to_server(DoctorAnswers(self), self._server)
        partition_pb2_grpc.add_PartitionServiceServicer_to_server(
            PartitionAnswers(self), self._server
        )
        placement_pb2_grpc.add_PlacementServiceServicer_to_server(
            PlacementAnswers(self), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelAnswers(self), self._server)
        simulation_pb2_grpc.add_SimulationServiceServicer_to_server(
            SimulationAnswers(self), self._server
        )
        watch_pb2_grpc.add_WatchServiceServicer_to_server(WatchAnswers(self), self._server)
        operations_pb2_grpc.add_OperationsServicer_to_server(OperationAnswers(self), self._server)
        assert self._server.add_insecure_port(self.endpoint)
        self._server.start()

    def stop(self) -> None:
        """As a killed daemon: calls break off. The operations are kept, as a journal would."""
        self._server.stop(grace=None).wait()

    def wait(self, context: grpc.ServicerContext, condition: Any, timeout_s: float | None) -> None:
        """Wait for a condition of this node, or until the caller has gone."""

        def wake() -> None:
            with self.changed:
                self.changed.notify_all()

        if not context.add_callback(wake):
            return
        with self.changed:
            self.changed.wait_for(lambda: condition() or not context.is_active(), timeout_s)

    def take(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        with self.changed:
            self.calls.append(method)
            self.changed.notify_all()
        if refusal := self.refusals.get(method):
            context.abort_with_status(rpc_status.to_status(refusal.status()))

    def last(self, kind: type[Message]) -> Any:
        return next(one for one in reversed(self.requests) if isinstance(one, kind))

    def begin(self, metadata: model_pb2.OperationMetadata, response: Message) -> Operation:
        name = f"operations/{len(self.operations) + 1:04d}"
        metadata.stage = model_pb2.OPERATION_STAGE_COPYING
        metadata.bytes_done, metadata.bytes_total = GIB // 4, GIB
        metadata.create_time.GetCurrentTime()
        operation = Operation(name=name, metadata=packed(metadata))
        self.operations[name] = operation
        self.pending = response
        if not self.held:
            self.release(name)
        return operation

    def release(self, name: str) -> None:
        """Let an operation end, as `outcome` says."""
        operation = self.operations[name]
        metadata = model_pb2.OperationMetadata()
        operation.metadata.Unpack(metadata)
        metadata.stage = self.end_stage
        with self.changed:
            if self.outcome is None:
                operation.response.CopyFrom(packed(self.pending))
            else:
                operation.error.CopyFrom(self.outcome.status())
            operation.metadata.CopyFrom(packed(metadata))
            operation.done = True
            self.changed.notify_all()

    def find(self, name: str, context: grpc.ServicerContext) -> Operation:
        if name not in self.operations:
            refusal = Refusal(Reason.OPERATION_NOT_FOUND, f"no operation {name!r}")
            context.abort_with_status(rpc_status.to_status(refusal.status()))
        return self.operations[name]

    def find_model(self, name: str, context: grpc.ServicerContext) -> model_pb2.Model:
        if name.partition("@")[0] not in self.models:
            refusal = Refusal(Reason.MODEL_NOT_FOUND, f"no model {name!r}", {"model": name})
            context.abort_with_status(rpc_status.to_status(refusal.status()))
        return self.models[name.partition("@")[0]]


def ledger() -> common_pb2.Ledger:
    return common_pb2.Ledger(
        phases=[common_pb2.Phase(name="copy", duration_ms=300.0)],
        total_ms=410.0, first_token_ms=425.0, copied_bytes=GIB, evicted_bytes=GIB,
        copy_bytes_per_second=50e9, link_bytes_per_second=55e9, link_percent=90.9,
        requests_finished=12, requests_kept=3,
    )  # fmt: skip


def plan(request: model_pb2.SwapModelRequest) -> common_pb2.SwapPlan:
    return common_pb2.SwapPlan(
        partition=request.partition or PARTITION, outgoing=[f"{request.outgoing}@1"],
        incoming=f"{request.incoming}@1", copy_bytes=GIB, evict_bytes=GIB,
        device_bytes_needed=GIB, device_bytes_available=2 * GIB, predicted_ms=21.0,
    )  # fmt: skip


class Answers:
    def __init__(self, node: ScriptedNode) -> None:
        self.node = node


class NodeAnswers(Answers, node_pb2_grpc.NodeServiceServicer):
    def GetNode(self, request: Any, context: Any) -> node_pb2.Node:
        self.node.take("GetNode", request, context)
        return self.node.node

    def ListGpus(self, request: Any, context: Any) -> node_pb2.ListGpusResponse:
        self.node.take("ListGpus", request, context)
        return self.node.gpus

    def CordonGpu(self, request: Any, context: Any) -> node_pb2.Gpu:
        self.node.take("CordonGpu", request, context)
        return self.node.gpus.gpus[0]

    def UncordonGpu(self, request: Any, context: Any) -> node_pb2.Gpu:
        self.node.take("UncordonGpu", request, context)
        return self.node.gpus.gpus[0]

    def Calibrate(self, request: Any, context: Any) -> Operation:
        self.node.take("Calibrate", request, context)
        link = node_pb2.LinkRate(
            partition=PARTITION,
            host_to_device_bytes_per_second=50e9,
            device_to_host_bytes_per_second=40e9,
        )
        metadata = model_pb2.OperationMetadata(kind="calibrate", request_id=request.request_id)
        return self.node.begin(metadata, node_pb2.CalibrateResponse(links=[link]))


class DoctorAnswers(Answers, doctor_pb2_grpc.DoctorServiceServicer):
    def Examine(self, request: Any, context: Any) -> doctor_pb2.Examination:
        self.node.take("Examine", request, context)
        return self.node.examination


class SimulationAnswers(Answers, simulation_pb2_grpc.SimulationServiceServicer):
    def Inject(self, request: Any, context: Any) -> simulation_pb2.InjectResponse:
        self.node.take("Inject", request, context)
        return simulation_pb2.InjectResponse(message="it was done")

    def Clear(self, request: Any, context: Any) -> simulation_pb2.ClearResponse:
        self.node.take("Clear", request, context)
        return simulation_pb2.ClearResponse()


class PartitionAnswers(Answers, partition_pb2_grpc.PartitionServiceServicer):
    def ListPartitions(self, request: Any, context: Any) -> partition_pb2.ListPartitionsResponse:
        self.node.take("ListPartitions", request, context)
        return partition_pb2.ListPartitionsResponse(partitions=self.node.partitions)

    def GetPartition(self, request: Any, context: Any) -> partition_pb2.Partition:
        self.node.take("GetPartition", request, context)
        return self.node.partitions[0]

    def PlanLayout(self, request: Any, context: Any) -> partition_pb2.LayoutPlan:
        self.node.take("PlanLayout", request, context)
        return self.node.layout_plan

    def ApplyLayout(self, request: Any, context: Any) -> Operation:
        self.node.take("ApplyLayout", request, context)
        response = partition_pb2.ApplyLayoutResponse(
            plan_id=request.plan_id, created=["gpu1/3g.71gb@4"], destroyed=["gpu1"], moved=["a@1"],
            ended=self.node.ended if request.force else (), phases_ms=self.node.phases_ms,
        )  # fmt: skip
        if request.validate_only:
            return Operation(done=True, response=packed(response))
        metadata = model_pb2.OperationMetadata(kind="layout", request_id=request.request_id)
        return self.node.begin(metadata, response)

    def ListProfiles(self, request: Any, context: Any) -> partition_pb2.ListProfilesResponse:
        self.node.take("ListProfiles", request, context)
        return self.node.profiles

    def GetLayout(self, request: Any, context: Any) -> partition_pb2.Layout:
        self.node.take("GetLayout", request, context)
        return partition_pb2.Layout(text="version: 1\n")


class PlacementAnswers(Answers, placement_pb2_grpc.PlacementServiceServicer):
    def PlanPlacement(self, request: Any, context: Any) -> placement_pb2.PlacementPlan:
        self.node.take("PlanPlacement", request, context)
        return self.node.placement

    def PlanDefragmentation(self, request: Any, context: Any) -> placement_pb2.DefragmentationPlan:
        self.node.take("PlanDefragmentation", request, context)
        return self.node.defragmentation


class ModelAnswers(Answers, model_pb2_grpc.ModelServiceServicer):
    def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        self.node.take("ListModels", request, context)
        names = sorted(self.node.models)
        begin = int(request.page_token or 0)
        end = begin + min(request.page_size or 50, self.node.page_size_max)
        return model_pb2.ListModelsResponse(
            models=[self.node.models[name] for name in names[begin:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    def GetModel(self, request: Any, context: Any) -> model_pb2.Model:
        self.node.take("GetModel", request, context)
        return self.node.find_model(request.name, context)

    def RegisterModel(self, request: Any, context: Any) -> model_pb2.Model:
        self.node.take("RegisterModel", request, context)
        return model_pb2.Model(
            name=request.name,
            versions=[version(request.name, common_pb2.MODEL_STATE_COLD, request.version or 1)],
        )

    def SwapModel(self, request: Any, context: Any) -> Operation:
        self.node.take("SwapModel", request, context)
        self.node.find_model(request.outgoing, context)
        self.node.find_model(request.incoming, context)
        response = model_pb2.SwapModelResponse(
            partition=request.partition or PARTITION, outgoing=request.outgoing,
            incoming=request.incoming, plan=plan(request),
        )  # fmt: skip
        if request.validate_only and self.node.plan_error is not None:
            return Operation(done=True, error=self.node.plan_error.status())
        if request.validate_only:
            return Operation(done=True, response=packed(response))
        response.ledger.CopyFrom(ledger())
        metadata = model_pb2.OperationMetadata(
            kind="swap", outgoing=request.outgoing, incoming=request.incoming,
            partition=response.partition, request_id=request.request_id, cause="api",
        )  # fmt: skip
        return self.node.begin(metadata, response)

    def _change(self, kind: str, request: Any, context: Any) -> Operation:
        self.node.take(kind, request, context)
        self.node.find_model(request.model, context)
        response = model_pb2.ModelOperationResponse(
            model=request.model, state=self.node.response_state, partition=PARTITION
        )
        if request.validate_only:
            return Operation(done=True, response=packed(response))
        metadata = model_pb2.OperationMetadata(
            kind=kind.removesuffix("Model").lower(), incoming=request.model, partition=PARTITION,
            request_id=request.request_id, cause="api",
        )  # fmt: skip
        return self.node.begin(metadata, response)

    def LoadModel(self, request: Any, context: Any) -> Operation:
        return self._change("LoadModel", request, context)

    def UnloadModel(self, request: Any, context: Any) -> Operation:
        return self._change("UnloadModel", request, context)

    def DrainModel(self, request: Any, context: Any) -> Operation:
        return self._change("DrainModel", request, context)

    def PinModel(self, request: Any, context: Any) -> model_pb2.Model:
        self.node.take("PinModel", request, context)
        model = self.node.find_model(request.model, context)
        if not request.validate_only:
            model.pinned = request.pinned
            for each in model.versions:
                each.pinned = request.pinned
        return model

    def StageModel(self, request: Any, context: Any) -> Operation:
        return self._change("StageModel", request, context)

    def ResumeModel(self, request: Any, context: Any) -> Operation:
        return self._change("ResumeModel", request, context)


class OperationAnswers(Answers, operations_pb2_grpc.OperationsServicer):
    def GetOperation(self, request: Any, context: Any) -> Operation:
        self.node.take("GetOperation", request, context)
        return self.node.find(request.name, context)

    def ListOperations(self, request: Any, context: Any) -> ListOperationsResponse:
        self.node.take("ListOperations", request, context)
        return ListOperationsResponse(operations=list(self.node.operations.values()))

    def WaitOperation(self, request: Any, context: Any) -> Operation:
        self.node.take("WaitOperation", request, context)
        operation = self.node.find(request.name, context)
        self.node.wait(context, lambda: operation.done, request.timeout.ToNanoseconds() / 1e9)
        return operation

    def CancelOperation(self, request: Any, context: Any) -> empty_pb2.Empty:
        self.node.take("CancelOperation", request, context)
        self.node.find(request.name, context)
        self.node.outcome = Refusal(Reason.CANCELLED, "cancelled by request")
        self.node.end_stage = model_pb2.OPERATION_STAGE_ROLLED_BACK
        self.node.release(request.name)
        return empty_pb2.Empty()


class WatchAnswers(Answers, watch_pb2_grpc.WatchServiceServicer):
    def Watch(self, request: Any, context: Any) -> Iterator[watch_pb2.WatchEvent]:
        self.node.take("Watch", request, context)
        script = self.node.watches.pop(0) if self.node.watches else []
        for step in script:
            if isinstance(step, Refusal):
                context.abort_with_status(rpc_status.to_status(step.status()))
            yield step
        if self.node.endless_watches:
            self.node.wait(context, lambda: False, None)
