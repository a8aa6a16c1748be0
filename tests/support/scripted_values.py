"""What a scripted node answers with, unless a test says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hotbay.reasons import DOMAIN, Reason
from hotbay.v1 import (
    common_pb2,
    model_pb2,
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
