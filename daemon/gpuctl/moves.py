"""load, stage, unload, swap, drain, resume: ask for the change, then follow it.

Each function is one command: it makes one call, and hands the operation to `follow` with a
sentence and a way back. It never looks at the node's state to decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from google.longrunning.operations_proto_pb2 import Operation
from hotbay.model_calls import InFlight
from hotbay.operations import operation_response
from hotbay.status import operation_metadata
from hotbay.v1 import common_pb2, model_pb2

from daemon.gpuctl.follow import Undo, follow, show_plan
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import command_line, milliseconds, word


@dataclass(frozen=True)
class How:
    """How a change is to be asked for, and followed."""

    request_id: str
    dry_run: bool
    wait: bool


def in_flight(choice: str | None) -> InFlight:
    """The policy of an option that was not given or is a word the client knows."""
    return cast(InFlight, choice or "default")


def load(
    session: Session,
    model: str,
    partition: str,
    how: How,
    *,
    standby: bool,
    queue: bool,
    canary: str,
    forget_canary: bool,
) -> None:
    """`gpuctl load`."""
    session.names = [model, partition]
    operation = session.client.load(
        model,
        partition=partition,
        standby=standby,
        queue=queue,
        canary=canary,
        forget_canary=forget_canary,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )

    def undo(done: Operation) -> str:
        state = _response(done).state
        if standby or state == common_pb2.MODEL_STATE_STANDBY:
            return command_line("gpuctl", "unload", model, "--evict")
        return command_line("gpuctl", "unload", model)

    _finish(session, operation, how, f"loaded {model}", undo)


def stage(
    session: Session, model: str, partition: str, layers: int, weights_bytes: int, how: How
) -> None:
    """`gpuctl stage`."""
    session.names = [model, partition]
    operation = session.client.stage(
        model,
        partition=partition,
        layers=layers,
        weights_bytes=weights_bytes,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )

    def undo(_: Operation) -> str:
        return command_line("gpuctl", "unload", model)

    _finish(session, operation, how, f"staged {model}", undo)


def unload(
    session: Session,
    model: str,
    policy: InFlight,
    drain_timeout_s: float | None,
    evict: bool,
    how: How,
) -> None:
    """`gpuctl unload`."""
    session.names = [model]
    operation = session.client.unload(
        model,
        in_flight=policy,
        drain_timeout_s=drain_timeout_s,
        evict=evict,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )

    def undo(done: Operation) -> str:
        return command_line("gpuctl", "load", model, *_partition_option(_partition_of(done)))

    _finish(session, operation, how, f"unloaded {model}", undo)


def swap(
    session: Session,
    outgoing: str,
    incoming: str,
    partition: str,
    policy: InFlight,
    drain_timeout_s: float | None,
    queue: bool,
    how: How,
) -> None:
    """`gpuctl swap`."""
    session.names = [outgoing, incoming, partition]
    operation = session.client.swap(
        outgoing,
        incoming,
        partition=partition,
        in_flight=policy,
        drain_timeout_s=drain_timeout_s,
        queue=queue,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )
    if how.dry_run:
        show_plan(session, operation)
        return

    def undo(done: Operation) -> str:
        where = _partition_option(partition or _partition_of(done))
        return command_line("gpuctl", "swap", incoming, outgoing, *where)

    def describe(done: Operation) -> str:
        return swap_sentence(done, outgoing, incoming)

    follow(session, operation, wait=how.wait, describe=describe, undo=undo)


def drain(
    session: Session, model: str, policy: InFlight, drain_timeout_s: float | None, how: How
) -> None:
    """`gpuctl drain`."""
    session.names = [model]
    operation = session.client.drain(
        model,
        in_flight=policy,
        drain_timeout_s=drain_timeout_s,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )

    def undo(_: Operation) -> str:
        return command_line("gpuctl", "resume", model)

    _finish(session, operation, how, f"drained {model}", undo)


def resume(session: Session, model: str, how: How) -> None:
    """`gpuctl resume`."""
    session.names = [model]
    operation = session.client.resume(model, request_id=how.request_id, validate_only=how.dry_run)

    def undo(_: Operation) -> str:
        return command_line("gpuctl", "drain", model)

    _finish(session, operation, how, f"resumed {model}", undo)


def swap_sentence(done: Operation, outgoing: str, incoming: str) -> str:
    """What a swap did: who left, who came, how long, and what became of the requests."""
    response = model_pb2.SwapModelResponse()
    done.response.Unpack(response)
    ledger = response.ledger
    kept = f", {ledger.requests_preserved} with their KV" if ledger.requests_preserved else ""
    return (
        f"swapped {outgoing} -> {incoming} on {response.partition} "
        f"in {milliseconds(ledger.total_ms)}: {ledger.requests_lost} requests lost, "
        f"{ledger.requests_finished} finished, {ledger.requests_kept} kept{kept}"
    )


def model_sentence(done: Operation, what: str) -> str:
    """What another change did to its model: `loaded a on gpu0, now ACTIVE`."""
    response = _response(done)
    where = f" on {response.partition}" if response.partition else ""
    state = word(common_pb2.ModelState.Name(response.state), "MODEL_STATE_")
    took = f" in {milliseconds(response.ledger.total_ms)}" if response.ledger.total_ms else ""
    reason = f": {response.message}" if response.message else ""
    return f"{what}{where}{took}, now {state}{reason}"


def _finish(
    session: Session,
    operation: Operation,
    how: How,
    what: str,
    undo: Undo,
) -> None:
    if how.dry_run:
        show_plan(session, operation)
        return
    follow(
        session,
        operation,
        wait=how.wait,
        describe=lambda done: model_sentence(done, what),
        undo=undo,
    )


def _response(operation: Operation) -> model_pb2.ModelOperationResponse:
    response = operation_response(operation)
    if isinstance(response, model_pb2.ModelOperationResponse):
        return response
    return model_pb2.ModelOperationResponse()


def _partition_of(operation: Operation) -> str:
    """Where it happened, from the response or, before there is one, from the metadata."""
    response = operation_response(operation)
    if isinstance(response, model_pb2.ModelOperationResponse | model_pb2.SwapModelResponse):
        return response.partition or operation_metadata(operation).partition
    return operation_metadata(operation).partition


def _partition_option(partition: str) -> tuple[str, ...]:
    return ("--partition", partition) if partition else ()
