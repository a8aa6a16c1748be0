"""Calls about models: which there are, where they come from, where they serve.

Owns their requests and deadlines. Each change returns at once; what takes time is an operation to
wait for.
"""

from __future__ import annotations

from typing import Literal

from google.longrunning.operations_proto_pb2 import Operation

from hotbay.connection import Connection
from hotbay.operations import duration_or_none
from hotbay.request_ids import new_request_id
from hotbay.v1 import common_pb2, model_pb2, model_pb2_grpc

# A pull is answered once the hub has said what the repository holds.
PULL_CALL_TIMEOUT_S = 30.0

InFlight = Literal["default", "drain", "preserve", "recompute", "abort"]


def policy(name: InFlight) -> common_pb2.InFlightPolicy.ValueType:
    """The in-flight policy of a word; `default` leaves the choice to the daemon."""
    word = "UNSPECIFIED" if name == "default" else name.upper()
    return common_pb2.InFlightPolicy.Value(f"IN_FLIGHT_POLICY_{word}")


class ModelCalls:
    """Part of `hotbay.client.Client`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._models = connection.stub(model_pb2_grpc.ModelServiceStub)

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
