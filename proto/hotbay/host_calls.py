"""Calls about the host: its daemon, its GPUs, what it lacks, and trouble upon a simulated driver.

Owns their requests and deadlines. It never waits for an operation.
"""

from __future__ import annotations

from google.longrunning.operations_proto_pb2 import Operation

from hotbay.connection import Connection
from hotbay.request_ids import new_request_id
from hotbay.v1 import (
    doctor_pb2,
    doctor_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    simulation_pb2,
    simulation_pb2_grpc,
)

# The driver may take its time, and so may the host's disks.
EXAMINE_TIMEOUT_S = 45.0


class HostCalls:
    """Part of `hotbay.client.Client`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._nodes = connection.stub(node_pb2_grpc.NodeServiceStub)
        self._doctor = connection.stub(doctor_pb2_grpc.DoctorServiceStub)
        self._simulation = connection.stub(simulation_pb2_grpc.SimulationServiceStub)

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
