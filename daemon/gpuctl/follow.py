"""From an operation just begun to its last line: wait, show, and tell what came of it.

Commands that change something all end here. It decides nothing about the change itself: it prints
the operation, how to undo it, and one sentence on what it did.
"""

from __future__ import annotations

from collections.abc import Callable

from google.longrunning.operations_proto_pb2 import Operation
from hotbay.errors import OperationFailed
from hotbay.operations import PREFIX, operation_response
from hotbay.status import operation_error
from hotbay.v1 import common_pb2, model_pb2

from daemon.gpuctl.console import complain, print_line
from daemon.gpuctl.output import print_json
from daemon.gpuctl.progress import Bar
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import milliseconds, rate, size

Describe = Callable[[Operation], str]
Undo = Callable[[Operation], str]


def follow(
    session: Session, operation: Operation, *, wait: bool, describe: Describe, undo: Undo
) -> None:
    """Wait for `operation` if so wished, and print what a reader or a program needs of it."""
    session.following = operation
    if not wait and not operation.done:
        _begun(session, operation, undo)
        return
    try:
        operation = wait_for(session, operation)
    except OperationFailed as failure:
        if session.json:
            print_json(failure.operation)
        raise
    if session.json:
        print_json(operation)
        return
    print_line(f"operation: {operation.name}")
    way_back = undo(operation)
    if way_back:
        print_line(f"undo:      {way_back}")
    print_line(describe(operation))


def wait_for(session: Session, operation: Operation) -> Operation:
    """Wait with a progress bar where there is somebody to see it."""
    session.following = operation
    with Bar(wanted=not session.json) as bar:

        def update(seen: Operation) -> None:
            session.following = seen
            bar.update(seen)

        on_update = update if bar.shown else None
        return session.client.wait(operation, timeout_s=session.timeout_s, on_update=on_update)


def _begun(session: Session, operation: Operation, undo: Undo) -> None:
    """Say what was begun: the bare name on standard output, for scripts; hints beside it."""
    if session.json:
        print_json(operation)
        return
    print_line(operation.name)
    complain(f"follow: gpuctl op wait {operation.name.removeprefix(PREFIX)}")
    way_back = undo(operation)
    if way_back:
        complain(f"undo:   {way_back}")


def show_plan(session: Session, operation: Operation) -> None:
    """The plan that a dry run answered with. Raises OperationFailed for one that cannot be."""
    failure = operation_error(operation)
    if failure is not None:
        raise failure
    if session.json:
        print_json(operation)
        return
    response = operation_response(operation)
    if isinstance(response, model_pb2.SwapModelResponse | model_pb2.ModelOperationResponse):
        for line in plan_lines(response.plan):
            print_line(line)
        if isinstance(response, model_pb2.ModelOperationResponse) and response.message:
            print_line(response.message)
    print_line("nothing was changed")


def plan_lines(plan: common_pb2.SwapPlan) -> list[str]:
    """A plan in a few aligned lines."""
    leaving = ", ".join(plan.outgoing) or "nothing leaves"
    fits = plan.device_bytes_needed <= plan.device_bytes_available
    lines = [
        f"plan:      {leaving} -> {plan.incoming or 'nothing'} on {plan.partition}",
        f"copy:      {size(plan.copy_bytes)} to the device, "
        f"{size(plan.evict_bytes)} given up there"
        + (f", {size(plan.staged_bytes)} staged already" if plan.staged_bytes else ""),
        f"device:    {size(plan.device_bytes_needed)} needed, "
        f"{size(plan.device_bytes_available)} available" + ("" if fits else ": DOES NOT FIT"),
    ]
    if plan.parked_bytes:
        lines.append(
            f"parks:     up to {size(plan.parked_bytes)} of KV in host memory, beside the copy"
        )
    if plan.build_bytes:
        lines.append(f"from disk: {size(plan.build_bytes)} into host memory first")
    if plan.host_evictions:
        lines.append(f"evicts:    {', '.join(plan.host_evictions)} from host memory")
    lines.append(f"predicted: {milliseconds(plan.predicted_ms)}")
    return lines


def ledger_lines(ledger: common_pb2.Ledger) -> list[str]:
    """A ledger in a few aligned lines."""
    lines = [f"total:     {milliseconds(ledger.total_ms)}"]
    lines += [f"  {phase.name:<14} {milliseconds(phase.duration_ms)}" for phase in ledger.phases]
    if ledger.first_token_ms:
        lines.append(f"to token:  {milliseconds(ledger.first_token_ms)}")
    lines.append(
        f"copied:    {size(ledger.copied_bytes)} at {rate(ledger.copy_bytes_per_second)}, "
        f"{ledger.link_percent:.0f}% of the link's {rate(ledger.link_bytes_per_second)}"
        + (", beside other partitions' copies" if ledger.link_missed else "")
        + (f"; {size(ledger.staged_bytes)} were staged" if ledger.staged_bytes else "")
    )
    if ledger.pageable_bytes:
        lines.append(
            f"slow:      {size(ledger.pageable_bytes)} were not pinned; the worker's log says why"
        )
    lines.append(
        f"requests:  {ledger.requests_lost} lost, {ledger.requests_finished} finished, "
        f"{ledger.requests_kept} kept"
        + (f", {ledger.requests_preserved} with their KV" if ledger.requests_preserved else "")
    )
    if ledger.residue_bytes:
        lines.append(f"residue:   {size(ledger.residue_bytes)} still held by what left")
    if ledger.parked_bytes:
        lines.append(f"parked:    {size(ledger.parked_bytes)} in {milliseconds(ledger.park_ms)}")
    if ledger.unpark_ms:
        lines.append(f"unparked:  in {milliseconds(ledger.unpark_ms)}")
    return lines
