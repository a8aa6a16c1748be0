"""The services of a scripted node: each keeps the request, and answers with what the node holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_proto_pb2 import ListOperationsResponse, Operation
from google.protobuf import empty_pb2
from grpc_status import rpc_status
from hotbay.reasons import Reason
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

from tests.support.scripted_values import PARTITION, Refusal, ledger, packed, plan, version

if TYPE_CHECKING:
    from tests.support.scripted_node import ScriptedNode


def add_services(server: Any, node: ScriptedNode) -> None:
    """Have a grpc server answer for the node."""
    node_pb2_grpc.add_NodeServiceServicer_to_server(NodeAnswers(node), server)
    doctor_pb2_grpc.add_DoctorServiceServicer_to_server(DoctorAnswers(node), server)
    partition_pb2_grpc.add_PartitionServiceServicer_to_server(PartitionAnswers(node), server)
    placement_pb2_grpc.add_PlacementServiceServicer_to_server(PlacementAnswers(node), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelAnswers(node), server)
    simulation_pb2_grpc.add_SimulationServiceServicer_to_server(SimulationAnswers(node), server)
    watch_pb2_grpc.add_WatchServiceServicer_to_server(WatchAnswers(node), server)
    operations_pb2_grpc.add_OperationsServicer_to_server(OperationAnswers(node), server)


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
