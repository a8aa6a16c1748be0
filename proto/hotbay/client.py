"""The public door: one object whose methods are the control API in plain Python.

Methods take words, numbers and seconds, give back the API's messages, and raise the errors of
`hotbay.errors`. Every change carries a `request_id`; give your own to be able to repeat a call
whose answer was lost: the daemon does it once. Nothing is cached, and nothing is connected before
the first call.

    with Client(default_endpoint(os.getuid(), os.environ)) as node:
        operation = node.swap("prose", "code")
        node.wait(operation)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

from google.longrunning.operations_proto_pb2 import Operation

from hotbay.connection import Connection
from hotbay.operations import Operations, duration_or_none
from hotbay.patience import Clock, SystemClock
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
)
from hotbay.watching import watch

CALL_TIMEOUT_S = 10.0
RECONNECT_S = 30.0
# A pull is answered once the hub has said what the repository holds.
PULL_CALL_TIMEOUT_S = 30.0
# The driver may take its time, and so may the host's disks.
EXAMINE_TIMEOUT_S = 45.0
# A search over the whole node, on a host that may be busy serving.
PLACEMENT_TIMEOUT_S = 60.0

InFlight = Literal["default", "drain", "preserve", "recompute", "abort"]


class Client:
    """A connection to one hotbayd.

    `timeout_s` bounds each call; `reconnect_s` bounds how long `wait` and `watch` put up with a
    daemon that has gone away.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        reconnect_s: float = RECONNECT_S,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._reconnect_s = reconnect_s
        self._connection = Connection(endpoint, timeout_s=timeout_s)
        self._nodes = self._connection.stub(node_pb2_grpc.NodeServiceStub)
        self._partitions = self._connection.stub(partition_pb2_grpc.PartitionServiceStub)
        self._placements = self._connection.stub(placement_pb2_grpc.PlacementServiceStub)
        self._models = self._connection.stub(model_pb2_grpc.ModelServiceStub)
        self._doctor = self._connection.stub(doctor_pb2_grpc.DoctorServiceStub)
        self._simulation = self._connection.stub(simulation_pb2_grpc.SimulationServiceStub)
        self._operations = Operations(self._connection, clock=self._clock, reconnect_s=reconnect_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Operations go on."""
        self._connection.close()

    # What there is.

    def node(self) -> node_pb2.Node:
        """The daemon and its host."""
        node: node_pb2.Node = self._connection.call(self._nodes.GetNode, node_pb2.GetNodeRequest())
        return node

    def gpus(self) -> node_pb2.ListGpusResponse:
        """The GPUs, and those that did not answer."""
        answer: node_pb2.ListGpusResponse = self._connection.call(
            self._nodes.ListGpus, node_pb2.ListGpusRequest()
        )
        return answer

    def examine(self) -> doctor_pb2.Examination:
        """What the daemon's host offers and lacks, each with the line that mends it."""
        answer: doctor_pb2.Examination = self._connection.call(
            self._doctor.Examine, doctor_pb2.ExamineRequest(), timeout_s=EXAMINE_TIMEOUT_S
        )
        return answer

    def partitions(self) -> list[partition_pb2.Partition]:
        """All partitions, with the models on them."""
        pages = self._connection.pages(
            self._partitions.ListPartitions, partition_pb2.ListPartitionsRequest()
        )
        return [partition for page in pages for partition in page.partitions]

    def partition(self, partition_id: str) -> partition_pb2.Partition:
        """One partition. Raises NotFound."""
        request = partition_pb2.GetPartitionRequest(id=partition_id)
        partition: partition_pb2.Partition = self._connection.call(
            self._partitions.GetPartition, request
        )
        return partition

    def profiles(self) -> partition_pb2.ListProfilesResponse:
        """What each GPU can be cut into."""
        answer: partition_pb2.ListProfilesResponse = self._connection.call(
            self._partitions.ListProfiles, partition_pb2.ListProfilesRequest()
        )
        return answer

    def plan_layout(self, layout: str, *, source: str = "") -> partition_pb2.LayoutPlan:
        """What a layout file's text would change; `source` is what errors call it.

        Raises InvalidArgument, naming the line that must change.
        """
        request = partition_pb2.PlanLayoutRequest(layout=layout, source=source)
        plan: partition_pb2.LayoutPlan = self._connection.call(self._partitions.PlanLayout, request)
        return plan

    def apply_layout(
        self,
        plan_id: str,
        *,
        force: bool = False,
        end_pids: Sequence[int] = (),
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Carry out a plan that `plan_layout` answered; the response is an ApplyLayoutResponse.

        With `force` processes of others in its way are ended: `end_pids`, and if there are more it
        is refused, or whichever there are. Raises Conflict (PLAN_STALE) when the GPUs have changed
        since.
        """
        request = partition_pb2.ApplyLayoutRequest(
            plan_id=plan_id,
            force=force,
            end_pids=end_pids,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._partitions.ApplyLayout, request)

    def plan_placement(self, models: str, *, source: str = "") -> placement_pb2.PlacementPlan:
        """A layout and a place for each model of a models file, as far as there is one.

        `source` is what errors call the file. Raises InvalidArgument, naming the line.
        """
        request = placement_pb2.PlanPlacementRequest(models=models, source=source)
        answer: placement_pb2.PlacementPlan = self._connection.call(
            self._placements.PlanPlacement, request, timeout_s=PLACEMENT_TIMEOUT_S
        )
        return answer

    def plan_defragmentation(
        self, *, worth_ms_per_gib: float = 0.0
    ) -> placement_pb2.DefragmentationPlan:
        """Which partitions are worth moving; its plan is applied by `apply_layout`.

        `worth_ms_per_gib` is how long a model may be away for each GiB that becomes of use.
        """
        request = placement_pb2.PlanDefragmentationRequest(worth_ms_per_gib=worth_ms_per_gib)
        answer: placement_pb2.DefragmentationPlan = self._connection.call(
            self._placements.PlanDefragmentation, request, timeout_s=PLACEMENT_TIMEOUT_S
        )
        return answer

    def layout(self) -> str:
        """The present layout as a file; planning that file changes nothing."""
        answer: partition_pb2.Layout = self._connection.call(
            self._partitions.GetLayout, partition_pb2.GetLayoutRequest()
        )
        return answer.text

    def models(self) -> list[model_pb2.Model]:
        """All registered models."""
        pages = self._connection.pages(self._models.ListModels, model_pb2.ListModelsRequest())
        return [model for page in pages for model in page.models]

    def model(self, name: str) -> model_pb2.Model:
        """One model. Raises NotFound."""
        model: model_pb2.Model = self._connection.call(
            self._models.GetModel, model_pb2.GetModelRequest(name=name)
        )
        return model

    # What can be changed. Each returns at once; what takes time is an operation to wait for.

    def register(
        self,
        name: str,
        directory: str,
        *,
        version: int = 0,
        request_id: str = "",
        validate_only: bool = False,
    ) -> model_pb2.Model:
        """Make the checkpoint in `directory`, on the daemon's host, known as `name`."""
        request = model_pb2.RegisterModelRequest(
            name=name,
            directory=directory,
            version=version,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        model: model_pb2.Model = self._connection.call(self._models.RegisterModel, request)
        return model

    def pull(
        self,
        repository: str,
        *,
        revision: str = "",
        name: str = "",
        token_file: str = "",
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Fetch a checkpoint from the daemon's hub and register it as `name`.

        `token_file` is a file of the daemon's host.
        """
        request = model_pb2.PullModelRequest(
            repository=repository,
            revision=revision,
            name=name,
            token_file=token_file,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.PullModel, request, timeout_s=PULL_CALL_TIMEOUT_S)

    def load(
        self,
        model: str,
        *,
        partition: str = "",
        standby: bool = False,
        queue: bool = False,
        canary: str = "",
        forget_canary: bool = False,
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Make a model ACTIVE where it fits, else leave it STANDBY; `standby` stops there.

        With `queue` it stands in line behind what changes the partition or the model now. With
        `canary`, a short text, the model must answer that in the same way whenever it comes in.
        """
        request = model_pb2.LoadModelRequest(
            model=model,
            partition=partition,
            standby=standby,
            queue=queue,
            canary=canary,
            forget_canary=forget_canary,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.LoadModel, request)

    def stage(
        self,
        model: str,
        *,
        partition: str = "",
        weights_bytes: int = 0,
        layers: int = 0,
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Put a model's weights into spare memory of a partition; a swap to it copies nothing.

        With `weights_bytes` or `layers` only the first of them; a swap then copies the rest.
        """
        request = model_pb2.StageModelRequest(
            model=model,
            partition=partition,
            weights_bytes=weights_bytes,
            layers=layers,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.StageModel, request)

    def calibrate(
        self, partition: str = "", *, request_id: str = "", validate_only: bool = False
    ) -> Operation:
        """Measure the link of a partition, or of all; the response is a CalibrateResponse."""
        request = node_pb2.CalibrateRequest(
            partition=partition,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._nodes.Calibrate, request)

    def cordon_gpu(
        self, gpu: str, *, reason: str = "", request_id: str = "", validate_only: bool = False
    ) -> node_pb2.Gpu:
        """Keep new models and swaps off a GPU, until `uncordon_gpu`; what serves there goes on."""
        request = node_pb2.CordonGpuRequest(
            gpu=gpu,
            reason=reason,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        answer: node_pb2.Gpu = self._connection.call(self._nodes.CordonGpu, request)
        return answer

    def uncordon_gpu(
        self, gpu: str, *, request_id: str = "", validate_only: bool = False
    ) -> node_pb2.Gpu:
        """Let models on a GPU again; where an operator is waited for, say that he has acted."""
        request = node_pb2.UncordonGpuRequest(
            gpu=gpu, request_id=request_id or new_request_id(), validate_only=validate_only
        )
        answer: node_pb2.Gpu = self._connection.call(self._nodes.UncordonGpu, request)
        return answer

    def inject(self, request: simulation_pb2.InjectRequest) -> simulation_pb2.InjectResponse:
        """Put trouble upon a simulated driver; a node with real GPUs does not know the call."""
        answer: simulation_pb2.InjectResponse = self._connection.call(
            self._simulation.Inject, request
        )
        return answer

    def clear_injections(self) -> simulation_pb2.ClearResponse:
        """Take all trouble of a simulated driver away."""
        answer: simulation_pb2.ClearResponse = self._connection.call(
            self._simulation.Clear, simulation_pb2.ClearRequest()
        )
        return answer

    def unload(
        self,
        model: str,
        *,
        in_flight: InFlight = "default",
        drain_timeout_s: float | None = None,
        evict: bool = False,
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Take a model off its partition, with `evict` out of host memory as well."""
        request = model_pb2.UnloadModelRequest(
            model=model,
            in_flight=policy(in_flight),
            drain_timeout=duration_or_none(drain_timeout_s),
            evict=evict,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.UnloadModel, request)

    def swap(
        self,
        outgoing: str,
        incoming: str,
        *,
        partition: str = "",
        in_flight: InFlight = "default",
        drain_timeout_s: float | None = None,
        queue: bool = False,
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Take `outgoing` out of ACTIVE and put `incoming` in; `validate_only` gives the plan.

        With `queue` it stands in line behind what changes the partition or a model of it now.
        """
        request = model_pb2.SwapModelRequest(
            outgoing=outgoing,
            incoming=incoming,
            partition=partition,
            in_flight=policy(in_flight),
            drain_timeout=duration_or_none(drain_timeout_s),
            queue=queue,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.SwapModel, request)

    def drain(
        self,
        model: str,
        *,
        in_flight: InFlight = "default",
        drain_timeout_s: float | None = None,
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Stop admitting requests for a model; its weights stay."""
        request = model_pb2.DrainModelRequest(
            model=model,
            in_flight=policy(in_flight),
            drain_timeout=duration_or_none(drain_timeout_s),
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._models.DrainModel, request)

    def resume(self, model: str, *, request_id: str = "", validate_only: bool = False) -> Operation:
        """Let a drained model serve again."""
        request = model_pb2.ResumeModelRequest(
            model=model, request_id=request_id or new_request_id(), validate_only=validate_only
        )
        return self._connection.call(self._models.ResumeModel, request)

    def pin(
        self, model: str, pinned: bool = True, *, request_id: str = "", validate_only: bool = False
    ) -> model_pb2.Model:
        """Keep a model's image in host memory once it is there, or with False let it go again."""
        request = model_pb2.PinModelRequest(
            model=model,
            pinned=pinned,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        answer: model_pb2.Model = self._connection.call(self._models.PinModel, request)
        return answer

    # What goes on.

    def operation(self, name: str) -> Operation:
        """Where an operation stands, by `operations/<id>` or `<id>`."""
        return self._operations.get(name)

    def operations(self) -> list[Operation]:
        """All operations that the daemon remembers."""
        return list(self._operations.list())

    def cancel(self, name: str) -> None:
        """Ask an operation to stop. Raises Conflict when it has passed the point where it can."""
        self._operations.cancel(name)

    def wait(
        self,
        operation: Operation | str,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[Operation], None] | None = None,
    ) -> Operation:
        """Wait for an operation, through restarts of the daemon; see `hotbay.operations`.

        Raises OperationFailed when it ended with an error, StillRunning after `timeout_s`.
        """
        return self._operations.wait(operation, timeout_s=timeout_s, on_update=on_update)

    def watch(
        self, kinds: Sequence[str] = (), *, resume_token: str = ""
    ) -> Iterator[watch_pb2.WatchEvent]:
        """Events without end, through restarts of the daemon; see `hotbay.watching`."""
        return watch(
            self._connection,
            clock=self._clock,
            reconnect_s=self._reconnect_s,
            kinds=kinds,
            resume_token=resume_token,
        )


def policy(name: InFlight) -> common_pb2.InFlightPolicy.ValueType:
    """The in-flight policy of a word; `default` leaves the choice to the daemon."""
    word = "UNSPECIFIED" if name == "default" else name.upper()
    return common_pb2.InFlightPolicy.Value(f"IN_FLIGHT_POLICY_{word}")


def new_request_id() -> str:
    """A request id that nobody has used."""
    return str(uuid.uuid4())
