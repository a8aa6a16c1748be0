"""From what gRPC and google.rpc say went wrong to the client's errors.

Pure functions: a failed call, or the error of an operation, becomes one HotbayError with the
reason, figures and message of the daemon. An error that carries no ErrorInfo of our domain keeps
its code and message, so that a proxy's or an older daemon's words are not lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc
from google.longrunning.operations_proto_pb2 import Operation
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from hotbay.errors import (
    CallTimedOut,
    HotbayError,
    OperationCancelled,
    OperationFailed,
    Unreachable,
    refusal,
)
from hotbay.reasons import DOMAIN, Code
from hotbay.v1 import model_pb2

# The key under which gRPC carries a google.rpc.Status in the trailers.
DETAILS_KEY = "grpc-status-details-bin"


def code_of(number: int) -> Code:
    """The code of a number; UNKNOWN for one that gRPC does not define."""
    try:
        return Code(number)
    except ValueError:
        return Code.UNKNOWN


def error_info(details: Iterable[object]) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of our domain among packed details; an empty one when there is none."""
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:  # type: ignore[attr-defined]
            return info
    return error_details_pb2.ErrorInfo()


def rpc_status(error: grpc.RpcError) -> status_pb2.Status | None:
    """The google.rpc.Status in the trailers of a failed call, if it has a readable one."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def call_error(error: grpc.RpcError, endpoint: str) -> HotbayError:
    """The client's error for a failed call to `endpoint`."""
    code = code_of(error.code().value[0])
    message = error.details() or code.name
    status = rpc_status(error)
    if status is None:
        # Without a status nobody on our side spoke: these two are gRPC's own.
        if code is Code.UNAVAILABLE:
            # gRPC wraps the system's words in its own; the last clause is the one that tells.
            cause = message.rpartition(": ")[2]
            return Unreachable(f"hotbayd does not answer at {endpoint}: {cause}")
        if code is Code.DEADLINE_EXCEEDED:
            return CallTimedOut(f"hotbayd at {endpoint} gave no answer in time")
        return refusal(code, message, metadata={})
    info = error_info(status.details)
    return refusal(
        code, status.message or message, reason=info.reason, metadata=dict(info.metadata)
    )


def operation_metadata(operation: Operation) -> model_pb2.OperationMetadata:
    """The metadata of one of our operations; empty where it holds something else."""
    metadata = model_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def operation_error(operation: Operation) -> OperationFailed | None:
    """The error of a finished operation, or None when it succeeded or still runs.

    An operation that ends while rolling back has not come to the end of that: only then are things
    not as they were.
    """
    if not operation.done or operation.WhichOneof("result") != "error":
        return None
    code = code_of(operation.error.code)
    info = error_info(operation.error.details)
    figures: Mapping[str, str] = dict(info.metadata)
    stage = operation_metadata(operation).stage
    kind = OperationCancelled if code is Code.CANCELLED else OperationFailed
    return kind(
        operation.error.message or code.name,
        operation=operation,
        rolled_back=stage != model_pb2.OPERATION_STAGE_ROLLING_BACK,
        code=code,
        reason=info.reason,
        metadata=figures,
    )
