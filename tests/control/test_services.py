"""The control API over its real socket, on a whole node with scripted peers."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from google.protobuf import descriptor_pb2
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hotbay.reasons import Reason
from hotbay.v1 import (
    doctor_pb2,
    model_pb2,
    node_pb2,
    partition_pb2,
    placement_pb2,
    scheduling_pb2,
    tenant_pb2,
    watch_pb2,
)

from daemon.control.services.answers import status
from daemon.control.state.records import Failure
from engine.link import control
from tests.support.control_api import Api, play, refusal

WORKING = {
    "NodeService": {"GetNode", "ListGpus", "Calibrate", "CordonGpu", "UncordonGpu"},
    "PartitionService": {
        *("ListPartitions", "GetPartition", "PlanLayout", "ListProfiles", "GetLayout"),
        "ApplyLayout",
    },
    "PlacementService": {"PlanPlacement", "PlanDefragmentation"},
    "ModelService": {
        *("RegisterModel", "PullModel", "ListModels", "GetModel"),
        *("LoadModel", "UnloadModel", "StageModel", "SwapModel", "DrainModel", "ResumeModel"),
        "PinModel",
    },
    "DoctorService": {"Examine"},
    "WatchService": {"Watch"},
    "SchedulingService": set(),
    "TenantService": set(),
}
SERVICES = [
    service
    for module in (
        node_pb2,
        partition_pb2,
        placement_pb2,
        model_pb2,
        doctor_pb2,
        watch_pb2,
        scheduling_pb2,
        tenant_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
]


def test_socket_is_this_users_alone(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        mode = api.stage.config().control_socket.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600

    play(tmp_path, scenario)


def test_node_gpus_and_partitions(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        request = node_pb2.GetNodeRequest()
        node = await api.call("hotbay.v1.NodeService/GetNode", request, node_pb2.Node)
        assert (node.version, node.simulated, node.http_address) == ("test", True, "127.0.0.1:1")
        assert node.host_store.budget_bytes > 0
        assert [each.role for each in node.processes] == ["hotbayd"]
        gpus = await api.call(
            "hotbay.v1.NodeService/ListGpus",
            node_pb2.ListGpusRequest(),
            node_pb2.ListGpusResponse,
        )
        assert [list(each.partitions) for each in gpus.gpus] == [["gpu0"]]
        listed = await api.call(
            "hotbay.v1.PartitionService/ListPartitions",
            partition_pb2.ListPartitionsRequest(),
            partition_pb2.ListPartitionsResponse,
        )
        (one,) = listed.partitions
        assert (one.id, one.health, one.device) == ("gpu0", 1, "host")
        assert one.gpu == gpus.gpus[0].uuid
        code, reason, metadata, _ = await refusal(
            api.call(
                "hotbay.v1.PartitionService/GetPartition",
                partition_pb2.GetPartitionRequest(id="gpu7"),
                partition_pb2.Partition,
            )
        )
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "PARTITION_NOT_FOUND")
        assert metadata == {"partition": "gpu7"}

    play(tmp_path, scenario)


def test_load_swap_and_their_operations(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        operation = await api.wait(await api.model("LoadModel", model="prose"))
        response = model_pb2.ModelOperationResponse()
        assert operation.done
        assert operation.response.Unpack(response)
        assert (response.model, response.state, response.partition) == ("prose@1", 4, "gpu0")
        plan = await api.model("SwapModel", outgoing="prose", incoming="code", validate_only=True)
        swapped = model_pb2.SwapModelResponse()
        assert plan.done
        assert plan.name == ""
        assert plan.response.Unpack(swapped)
        assert swapped.plan.build_bytes > 0
        operation = await api.wait(await api.model("SwapModel", outgoing="prose", incoming="code"))
        assert operation.response.Unpack(swapped)
        ledger = swapped.ledger
        assert [phase.name for phase in ledger.phases] == [
            "drain",
            "evict",
            "link_wait",
            "copy",
            "verify",
        ]
        assert ledger.copy_bytes_per_second == pytest.approx(500_000)
        assert ledger.link_percent == pytest.approx(50)
        metadata = model_pb2.OperationMetadata()
        assert operation.metadata.Unpack(metadata)
        assert (metadata.kind, metadata.outgoing, metadata.incoming, metadata.cause) == (
            *("swap", "prose@1", "code@1"),
            "api",
        )
        assert metadata.cancellable is False
        assert metadata.end_time.ToSeconds() > 0
        model = await api.model("GetModel", model_pb2.Model, name="code@1")
        assert (model.versions[0].state, model.versions[0].partition) == (4, "gpu0")

    play(tmp_path, scenario, "prose", "code")


def test_request_ids_are_idempotent_and_bound_to_their_request(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        first = await api.model("LoadModel", model="prose", request_id="id-1")
        assert (await api.model("LoadModel", model="prose", request_id="id-1")).name == first.name
        await api.wait(first)
        again = await api.model("LoadModel", model="prose", request_id="id-1")
        assert (again.name, again.done) == (first.name, True)
        code, reason, metadata, _ = await refusal(
            api.model("LoadModel", model="prose", standby=True, request_id="id-1")
        )
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        assert metadata["operation"] == first.name

    play(tmp_path, scenario, "prose")


def test_registering_by_call(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        directory = api.stage.model("elsewhere")
        fields = {"name": "mine", "directory": str(directory), "request_id": "r"}
        dry = await api.model("RegisterModel", model_pb2.Model, **fields, validate_only=True)
        assert dry.versions[0].family == "llama"
        listed = await api.model("ListModels", model_pb2.ListModelsResponse)
        assert not listed.models
        for _ in range(2):
            model = await api.model("RegisterModel", model_pb2.Model, **fields)
            assert [each.key for each in model.versions] == ["mine@1"]
        assert api.stage.gateway.route("mine@1").disposition == "hold"
        code, reason, *_ = await refusal(
            api.model("RegisterModel", model_pb2.Model, name="a/b", directory=str(directory))
        )
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        bad = api.stage.model("broken", bad="1")
        code, reason, _, message = await refusal(
            api.model("RegisterModel", model_pb2.Model, name="broken", directory=str(bad))
        )
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_INVALID")
        assert message == "tensor x is missing"

    play(tmp_path, scenario)


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        token, names = "", []
        while True:
            page = await api.model(
                "ListModels", model_pb2.ListModelsResponse, page_size=2, page_token=token
            )
            names += [each.name for each in page.models]
            token = page.next_page_token
            if not token:
                break
        assert names == ["a", "b", "c", "d", "e"]
        for fields in ({"page_size": -1}, {"page_token": "!!"}, {"page_token": "enp6"}):
            code, reason, *_ = await refusal(
                api.model("ListModels", model_pb2.ListModelsResponse, **fields)
            )
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")

    play(tmp_path, scenario, *"abcde")


def test_operations_service(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        api.stage.worker.pause_at = control.Stage.COPYING
        operation = await api.model("LoadModel", model="prose")
        await api.stage.worker.paused.wait()
        listing = longrunning.ListOperationsResponse
        running = await api.operation("ListOperations", listing, filter="done=false")
        assert [each.name for each in running.operations] == [operation.name]
        request = longrunning.WaitOperationRequest(name=operation.name)
        request.timeout.FromMilliseconds(20)
        waited = await api.call(
            "google.longrunning.Operations/WaitOperation", request, longrunning.Operation
        )
        assert waited.done is False
        metadata = model_pb2.OperationMetadata()
        waited.metadata.Unpack(metadata)
        assert metadata.cancellable
        assert metadata.stage == model_pb2.OPERATION_STAGE_COPYING
        await api.operation("CancelOperation", name=operation.name)
        ended = await api.wait(operation)
        assert ended.error.code == 1
        code, reason, *_ = await refusal(api.operation("CancelOperation", name=operation.name))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_CANCELLABLE")
        await api.operation("DeleteOperation", name=operation.name)
        code, reason, *_ = await refusal(api.operation("GetOperation", name=operation.name))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
        code, *_ = await refusal(api.operation("ListOperations", listing, filter="color=red"))
        assert code == grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, scenario, "prose")


@pytest.mark.parametrize("service", SERVICES, ids=lambda each: each.name)
def test_what_is_not_there_yet_says_so(tmp_path: Path, service: Any) -> None:
    async def scenario(api: Api) -> None:
        for method in service.methods:
            if method.name in WORKING[service.name]:
                continue
            request = GetMessageClass(method.input_type)()
            answer = GetMessageClass(method.output_type)
            code, reason, metadata, _ = await refusal(
                api.call(f"{service.full_name}/{method.name}", request, answer)
            )
            assert (code, reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
            assert metadata["method"] == f"{service.name}.{method.name}"

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"outgoing": "", "incoming": "code"}, "outgoing"),
        ({"outgoing": "prose", "incoming": ""}, "incoming"),
        ({"outgoing": "prose", "incoming": "code", "in_flight": 77}, "in_flight"),
        ({"outgoing": "prose", "incoming": "code", "drain_timeout": -1}, "drain_timeout"),
        ({"outgoing": "prose", "incoming": "code", "request_id": "x" * 200}, "request_id"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    async def scenario(api: Api) -> None:
        request = model_pb2.SwapModelRequest()
        for name, value in fields.items():
            if name == "drain_timeout":
                request.drain_timeout.FromSeconds(value)
            else:
                setattr(request, name, value)
        code, _, metadata, _ = await refusal(
            api.call("hotbay.v1.ModelService/SwapModel", request, longrunning.Operation)
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert metadata["field"] == field

    play(tmp_path, scenario, "prose", "code")


def test_unavailable_says_when_to_try_again(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await api.stage.fleet.lose("gpu0")
        api.stage.fleet.reasons["gpu0"] = "it was ended by SIGKILL"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.model("LoadModel", model="prose", partition="gpu0")
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "SIGKILL" in caught.value.details()
        retry = error_details_pb2.RetryInfo()
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0

    play(tmp_path, scenario, "prose")


def test_health_and_reflection(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        health = health_pb2_grpc.HealthStub(api.channel)
        for name in ("", "hotbay.v1.ModelService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(api.channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="google.rpc.ErrorInfo"),
        ]
        answers = [each async for each in reflection.ServerReflectionInfo(iter(asked))]
        names = {each.name for each in answers[0].list_services_response.service}
        assert {each.full_name for each in SERVICES} <= names
        assert "google.longrunning.Operations" in names
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(each)
            for each in answers[1].file_descriptor_response.file_descriptor_proto
        ]
        assert any(message.name == "ErrorInfo" for file in files for message in file.message_type)

    play(tmp_path, scenario)


def test_every_reason_has_its_code() -> None:
    for reason in Reason:
        answer = status(Failure(reason.value, "what", {"figure": "7"}))
        assert answer.code == reason.code.value
    assert status(Failure("NEVER_HEARD_OF", "what")).code == 13
