"""A node that answers as it was told: the services of the control API over a real Unix socket.

It is a real grpc server, so that clients are tested over the real wire, with a model of a node just
large enough to give sensible answers: models with a state, one partition, operations that end at
once, on release, or with an error. It never decides anything a daemon would; what a test wants to
see, the test says. Every request is kept in `requests`.
"""

from __future__ import annotations

import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.longrunning.operations_proto_pb2 import Operation
from google.protobuf.message import Message
from grpc_status import rpc_status
from hotbay.reasons import Reason
from hotbay.v1 import (
    common_pb2,
    doctor_pb2,
    model_pb2,
    node_pb2,
    partition_pb2,
    placement_pb2,
    watch_pb2,
)

from tests.support.scripted_answers import add_services
from tests.support.scripted_values import GIB, PARTITION, Refusal, packed, version


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
        add_services(self._server, self)
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
