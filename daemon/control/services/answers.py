"""Operations and failures as the API's messages.

It owns the translation from records to google.longrunning and google.rpc and nothing else. The
invariant: whatever fails is answered in one shape, with a reason of the catalogue, its figures, and
what the reader can do.
"""

from __future__ import annotations

import datetime

from google.longrunning import operations_proto_pb2 as longrunning
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from hotbay.reasons import DOMAIN, Reason, known
from hotbay.v1 import common_pb2, model_pb2, node_pb2, partition_pb2

from daemon.control.state.records import Failure, Kind, Operation, Plan, Stage
from engine.link.control import Ledger

RETRY_DELAY_MS = 1000


def timestamp(seconds: float) -> Timestamp:
    """A time of the epoch; the empty message for 0."""
    stamp = Timestamp()
    if seconds:
        stamp.FromDatetime(datetime.datetime.fromtimestamp(seconds, datetime.UTC))
    return stamp


def status(failure: Failure) -> status_pb2.Status:
    """A failure as google.rpc.Status with ErrorInfo, and RetryInfo where trying again may help."""
    reason = known(failure.reason) or Reason.INTERNAL
    answer = status_pb2.Status(code=reason.code.value, message=failure.message)
    info = error_details_pb2.ErrorInfo(
        reason=reason.value, domain=DOMAIN, metadata=failure.metadata
    )
    answer.details.add().Pack(info)
    if reason.code.name == "UNAVAILABLE":
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(RETRY_DELAY_MS)
        answer.details.add().Pack(retry)
    return answer


def ledger(told: Ledger | None, predicted_ms: float = 0.0) -> common_pb2.Ledger | None:
    """What an exchange did, with the rates that follow from it, and what was foreseen."""
    if told is None:
        return None
    phases = {
        "drain": told.drain_ms,
        "evict": told.evict_ms,
        "link_wait": told.link_wait_ms,
        "copy": told.copy_ms,
        "verify": told.verify_ms,
    }
    if told.canary_ms:
        phases["canary"] = told.canary_ms
    rate = told.copied_bytes / told.copy_ms * 1000 if told.copy_ms else 0.0
    return common_pb2.Ledger(
        phases=[common_pb2.Phase(name=name, duration_ms=ms) for name, ms in phases.items()],
        total_ms=told.total_ms,
        first_token_ms=told.first_token_ms or 0.0,
        copied_bytes=told.copied_bytes,
        evicted_bytes=told.evicted_bytes,
        copy_bytes_per_second=rate,
        link_bytes_per_second=told.link_bytes_per_s,
        link_percent=rate / told.link_bytes_per_s * 100 if told.link_bytes_per_s else 0.0,
        requests_finished=told.requests_finished,
        requests_kept=told.requests_kept,
        requests_lost=told.requests_lost,
        requests_preserved=told.requests_preserved,
        parked_bytes=told.parked_bytes,
        park_ms=told.park_ms,
        unpark_ms=told.unpark_ms,
        link_missed=told.link_missed,
        pageable_bytes=told.pageable_bytes,
        staged_bytes=told.staged_bytes,
        residue_bytes=told.residue_bytes,
        predicted_ms=predicted_ms,
    )


def plan(foreseen: Plan) -> common_pb2.SwapPlan:
    return common_pb2.SwapPlan(
        partition=foreseen.partition,
        outgoing=foreseen.outgoing,
        incoming=foreseen.incoming,
        copy_bytes=foreseen.copy_bytes,
        evict_bytes=foreseen.evict_bytes,
        build_bytes=foreseen.build_bytes,
        host_evictions=foreseen.host_evictions,
        device_bytes_needed=foreseen.device_bytes_needed,
        device_bytes_available=foreseen.device_bytes_available,
        predicted_ms=foreseen.predicted_ms,
        staged_bytes=foreseen.staged_bytes,
        parked_bytes=foreseen.parked_bytes,
    )


def operation(record: Operation) -> longrunning.Operation:
    """An operation with its metadata, and its response or error once it is done."""
    intent, result = record.intent, record.result
    metadata = model_pb2.OperationMetadata(
        kind=intent.kind.value,
        request_id=record.request_id,
        stage=model_pb2.OperationStage.Value(f"OPERATION_STAGE_{record.stage.value}"),
        partition=record.plan.partition or intent.partition,
        outgoing=",".join(intent.outgoing),
        incoming=intent.incoming,
        bytes_done=record.bytes_done,
        bytes_total=record.bytes_total,
        requests_left=record.requests_left,
        create_time=timestamp(record.created_s),
        cause=intent.cause.value,
        message=record.message or (result.message if result is not None else ""),
        cancellable=not record.done and record.stage is not Stage.COMMITTED,
        plan=plan(record.plan),
    )
    if record.done:
        metadata.end_time.CopyFrom(timestamp(record.ended_s))
    answer = longrunning.Operation(name=record.name, done=record.done)
    if record.failure is not None:
        answer.error.CopyFrom(status(record.failure))
    elif result is not None:
        told = ledger(result.ledger, record.plan.predicted_ms)
        if told is not None:
            metadata.ledger.CopyFrom(told)
        answer.response.CopyFrom(_response(record, told))
    answer.metadata.Pack(metadata)
    return answer


def _response(record: Operation, told: common_pb2.Ledger | None) -> Any:
    result, intent = record.result, record.intent
    assert result is not None
    response: (
        model_pb2.SwapModelResponse
        | model_pb2.ModelOperationResponse
        | node_pb2.CalibrateResponse
        | partition_pb2.ApplyLayoutResponse
    )
    if intent.kind is Kind.CALIBRATE:
        response = node_pb2.CalibrateResponse(
            links=[
                node_pb2.LinkRate(
                    partition=each.partition,
                    host_to_device_bytes_per_second=each.bytes_per_s,
                    device_to_host_bytes_per_second=each.out_bytes_per_s,
                )
                for each in result.links
            ]
        )
    elif result.layout is not None:
        response = partition_pb2.ApplyLayoutResponse(
            plan_id=intent.layout,
            created=result.layout.created,
            destroyed=result.layout.destroyed,
            moved=result.layout.moved,
            phases_ms=result.layout.phases_ms,
            ended=[
                partition_pb2.ForeignProcess(
                    pid=each.pid, partition=each.where, command=each.command, owner=each.owner
                )
                for each in result.layout.ended
            ],
            message=result.message,
        )
    elif intent.kind is Kind.SWAP:
        response = model_pb2.SwapModelResponse(
            partition=record.plan.partition,
            outgoing=",".join(intent.outgoing),
            incoming=intent.incoming,
            plan=plan(record.plan),
            ledger=told,
        )
    else:
        response = model_pb2.ModelOperationResponse(
            model=result.model,
            state=model_state(result.state),
            partition=result.partition,
            message=result.message,
            plan=plan(record.plan),
            ledger=told,
        )
    packed = Any()
    packed.Pack(response)
    return packed


def model_state(word: str) -> common_pb2.ModelState.ValueType:
    """The API's name of a state."""
    return common_pb2.ModelState.Value(f"MODEL_STATE_{word}")
