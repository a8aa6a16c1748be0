"""op ls, show, wait and cancel: operations, by `operations/<id>` or `<id>`.

Reads and prints; the only thing it changes is to ask for a cancellation.
"""

from __future__ import annotations

from google.longrunning.operations_proto_pb2 import ListOperationsResponse, Operation
from hotbay.operations import PREFIX, operation_name, operation_response
from hotbay.status import operation_error, operation_metadata
from hotbay.v1 import model_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.follow import follow, ledger_lines, plan_lines
from daemon.gpuctl.moves import model_sentence, swap_sentence
from daemon.gpuctl.nodes import ago
from daemon.gpuctl.output import Column, print_json, print_table
from daemon.gpuctl.progress import stage_word, standing
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING

COLUMNS = (
    Column("OPERATION"), Column("KIND"), Column("MODELS"), Column("PARTITION"),
    Column("STAGE"), Column("CAUSE"), Column("AGE", right=True), Column("RESULT"),
)  # fmt: skip


def list_operations(session: Session, running: bool) -> None:
    """`gpuctl op ls`."""
    found = [one for one in session.client.operations() if not (running and one.done)]
    if session.json:
        print_json(ListOperationsResponse(operations=found))
        return
    print_table(COLUMNS, [_row(one) for one in found], "no operations")


def show(session: Session, name: str) -> None:
    """`gpuctl op show`."""
    operation = session.client.operation(name)
    if session.json:
        print_json(operation)
        return
    metadata = operation_metadata(operation)
    print_line(f"operation: {operation.name}")
    where = f" on {metadata.partition}" if metadata.partition else ""
    print_line(f"what:      {metadata.kind} {models_of(metadata)}{where}")
    print_line(f"stage:     {standing(metadata)}")
    print_line(f"result:    {_result(operation)}")
    print_line(f"cause:     {metadata.cause or NOTHING}, request {metadata.request_id or NOTHING}")
    if metadata.message:
        print_line(f"message:   {metadata.message}")
    if metadata.plan.ByteSize():  # some kinds have nothing to plan
        for line in plan_lines(metadata.plan):
            print_line(line)
    if metadata.HasField("ledger"):
        for line in ledger_lines(metadata.ledger):
            print_line(line)


def wait(session: Session, name: str) -> None:
    """`gpuctl op wait`: exits as the command that began the operation would have."""
    operation = session.client.operation(name)
    follow(session, operation, wait=True, describe=_sentence, undo=lambda _: "")


def cancel(session: Session, name: str) -> None:
    """`gpuctl op cancel`."""
    session.client.cancel(name)
    operation = session.client.operation(name)
    if session.json:
        print_json(operation)
        return
    print_line(f"asked {operation_name(name)} to stop; see gpuctl op show {_short(operation)}")


def models_of(metadata: model_pb2.OperationMetadata) -> str:
    """`a -> b`, or the one model there is."""
    names = [name for name in (metadata.outgoing, metadata.incoming) if name]
    return " -> ".join(names) or NOTHING


def _sentence(operation: Operation) -> str:
    metadata = operation_metadata(operation)
    if isinstance(operation_response(operation), model_pb2.SwapModelResponse):
        return swap_sentence(operation, metadata.outgoing, metadata.incoming)
    return model_sentence(operation, f"{metadata.kind} of {models_of(metadata)} done")


def _short(operation: Operation) -> str:
    return str(operation.name).removeprefix(PREFIX)


def _result(operation: Operation) -> str:
    if not operation.done:
        return "running"
    error = operation_error(operation)
    return "done" if error is None else f"{error.reason or error.code.name}: {error.message}"


def _row(operation: Operation) -> list[str]:
    metadata = operation_metadata(operation)
    return [
        _short(operation),
        metadata.kind,
        models_of(metadata),
        metadata.partition or NOTHING,
        stage_word(metadata),
        metadata.cause or NOTHING,
        ago(metadata.create_time),
        _result(operation),
    ]
