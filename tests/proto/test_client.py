"""The client's methods over a real socket: what is sent, what comes back, what is raised."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from hotbay import errors
from hotbay.client import Client
from hotbay.connection import Connection
from hotbay.model_calls import InFlight, policy
from hotbay.operations import operation_name, operation_response
from hotbay.reasons import Code, Reason
from hotbay.status import call_error, code_of, error_info, operation_error, operation_metadata
from hotbay.v1 import common_pb2, model_pb2

from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB, PARTITION, Refusal, packed, version


def test_what_there_is(client: Client) -> None:
    assert client.node().version == "9.9.9"
    assert [gpu.uuid for gpu in client.gpus().gpus] == ["GPU-0"]
    assert [one.id for one in client.partitions()] == [PARTITION]
    assert client.partition(PARTITION).memory_bytes == 2 * GIB
    assert client.model("prose@production").labels == {"production": 1}


def test_lists_are_read_to_their_last_page(node: ScriptedNode, client: Client) -> None:
    for number in range(7):
        name = f"model-{number}"
        node.models[name] = model_pb2.Model(name=name, versions=[version(name, 1)])
    node.page_size_max = 4
    assert [model.name for model in client.models()] == sorted(node.models)
    pages = [one for one in node.requests if isinstance(one, model_pb2.ListModelsRequest)]
    assert [page.page_token for page in pages] == ["", "4", "8"]


def test_a_swap_carries_everything_asked_for(node: ScriptedNode, client: Client) -> None:
    done = client.swap(
        "prose", "code", partition="gpu0", in_flight="recompute", drain_timeout_s=2.5,
        request_id="mine",
    )  # fmt: skip
    request = node.last(model_pb2.SwapModelRequest)
    assert (request.outgoing, request.incoming, request.partition) == ("prose", "code", "gpu0")
    assert request.in_flight == common_pb2.IN_FLIGHT_POLICY_RECOMPUTE
    assert (request.drain_timeout.seconds, request.drain_timeout.nanos) == (2, 500_000_000)
    assert (request.request_id, request.validate_only) == ("mine", False)
    assert operation_metadata(done).kind == "swap"
    response = operation_response(done)
    assert isinstance(response, model_pb2.SwapModelResponse)
    assert response.ledger.requests_finished == 12


def test_what_is_not_said_is_left_to_the_daemon(node: ScriptedNode, client: Client) -> None:
    client.swap("prose", "code")
    request = node.last(model_pb2.SwapModelRequest)
    assert request.in_flight == common_pb2.IN_FLIGHT_POLICY_UNSPECIFIED
    assert not request.HasField("drain_timeout")
    client.drain("prose", drain_timeout_s=0.0)
    drain = node.last(model_pb2.DrainModelRequest)
    assert drain.HasField("drain_timeout")
    assert drain.drain_timeout.ToNanoseconds() == 0


def test_every_change_has_a_request_id_of_its_own(node: ScriptedNode, client: Client) -> None:
    client.register("new", "/models/new", version=2)
    client.load("prose", standby=True)
    client.unload("prose", evict=True, in_flight="abort")
    client.swap("prose", "code")
    client.drain("prose")
    client.resume("prose")
    sent: list[Any] = [
        one for one in node.requests if "request_id" in one.DESCRIPTOR.fields_by_name
    ]
    assert len(sent) == 6
    assert len({uuid.UUID(one.request_id) for one in sent}) == 6
    assert all(uuid.UUID(one.request_id).version == 4 for one in sent)
    assert node.last(model_pb2.RegisterModelRequest).version == 2
    assert node.last(model_pb2.LoadModelRequest).standby
    assert node.last(model_pb2.UnloadModelRequest).evict


@pytest.mark.parametrize("name", ["default", "drain", "preserve", "recompute", "abort"])
def test_policies_are_the_words_of_the_api(name: InFlight) -> None:
    expected = "UNSPECIFIED" if name == "default" else name.upper()
    assert common_pb2.InFlightPolicy.Name(policy(name)) == f"IN_FLIGHT_POLICY_{expected}"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.INVALID_ARGUMENT, errors.InvalidArgument),
        (Reason.PARTITION_NOT_FOUND, errors.NotFound),
        (Reason.OPERATION_IN_PROGRESS, errors.Conflict),
        (Reason.INVALID_STATE, errors.Conflict),
        (Reason.MODEL_EXISTS, errors.Conflict),
        (Reason.ROLE_DENIED, errors.Denied),
        (Reason.INSUFFICIENT_HOST_MEMORY, errors.NoCapacity),
        (Reason.DAEMON_DRAINING, errors.Unavailable),
        (Reason.NOT_IMPLEMENTED, errors.Unsupported),
        (Reason.WORKER_CRASHED, errors.ServerFailed),
        (Reason.CORRUPT_WEIGHTS, errors.ServerFailed),
    ],
)
def test_a_refusal_arrives_with_reason_message_and_figures(
    node: ScriptedNode, client: Client, reason: Reason, kind: type[errors.Refused]
) -> None:
    node.refusals["LoadModel"] = Refusal(reason, "no, because", {"needed_bytes": "12"})
    with pytest.raises(kind) as caught:
        client.load("prose")
    error = caught.value
    assert type(error) is kind
    assert (error.reason, error.message, error.code) == (reason, "no, because", reason.code)
    assert error.metadata == {"needed_bytes": "12"}
    assert error.advice == reason.advice


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with (
        Client(f"unix:{tmp_path}/none.sock") as client,
        pytest.raises(errors.Unreachable, match=r"none\.sock: No such file or directory$"),
    ):
        client.node()


def test_a_method_the_daemon_lacks(client: Client) -> None:
    connection = Connection(client._connection.endpoint, timeout_s=5)
    method = connection.stub(lambda channel: channel.unary_unary("/hotbay.v1.New/Method"))
    with pytest.raises(errors.Unsupported) as caught:
        connection.call(method, b"")
    assert caught.value.reason == ""
    connection.close()


def test_an_answer_that_does_not_come(node: ScriptedNode) -> None:
    released = threading.Event()
    take = node.take

    def stuck(method: str, request: Any, context: Any) -> None:
        released.wait()
        take(method, request, context)

    node.take = stuck  # type: ignore[method-assign]
    with Client(node.endpoint, timeout_s=0.05) as client, pytest.raises(errors.CallTimedOut):
        client.node()
    released.set()


class Failed(grpc.RpcError):
    """A failed call, as grpc would hand it over."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        self._parts = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def test_details_that_cannot_be_read_leave_code_and_message() -> None:
    trailers = (("grpc-status-details-bin", b"\xff\xff\xff"),)
    error = call_error(Failed(grpc.StatusCode.NOT_FOUND, "gone", trailers), "unix:/x")
    assert isinstance(error, errors.NotFound)
    assert (error.message, error.reason) == ("gone", "")
    bare = call_error(Failed(grpc.StatusCode.INTERNAL, "", None), "unix:/x")
    assert (type(bare), bare.message) == (errors.ServerFailed, "INTERNAL")


def test_another_domains_reason_is_not_ours() -> None:
    foreign = packed(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="other.example"))
    ours = packed(error_details_pb2.ErrorInfo(reason="TIMED_OUT", domain="hotbay"))
    assert error_info([foreign]).reason == ""
    assert error_info([foreign, ours]).reason == "TIMED_OUT"
    assert code_of(4711) is Code.UNKNOWN


def test_operations_by_either_name(node: ScriptedNode, client: Client) -> None:
    begun = client.swap("prose", "code")
    assert operation_name("0001") == operation_name("operations/0001") == begun.name
    assert client.operation("0001") == client.operation(begun.name) == begun
    assert [one.name for one in client.operations()] == [begun.name]
    with pytest.raises(errors.NotFound) as caught:
        client.operation("9999")
    assert caught.value.reason == Reason.OPERATION_NOT_FOUND


def test_only_a_finished_failure_is_a_failure(node: ScriptedNode, client: Client) -> None:
    node.held = True
    running = client.swap("prose", "code")
    assert operation_error(running) is None
    assert operation_response(running) is None
    node.release(running.name)
    assert operation_error(client.operation(running.name)) is None
