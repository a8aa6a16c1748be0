"""Long-running operations: read them, wait for them, cancel them.

A wait outlives restarts of hotbayd, whose operations are durable: it asks again until the daemon
is back, for at most `reconnect_s` in one piece. It never cancels an operation: who stops waiting
leaves it running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_proto_pb2 import (
    CancelOperationRequest,
    GetOperationRequest,
    ListOperationsRequest,
    Operation,
    WaitOperationRequest,
)
from google.protobuf import duration_pb2
from google.protobuf.message import Message

from hotbay.connection import Connection
from hotbay.errors import CallTimedOut, StillRunning, Unavailable, Unreachable
from hotbay.patience import Clock, Outage
from hotbay.status import operation_error
from hotbay.v1 import model_pb2, node_pb2, partition_pb2

PREFIX = "operations/"
# How long the daemon may hold one WaitOperation call, when nobody looks at the progress...
HOLD_S = 10.0
# ... and when somebody does.
HOLD_WATCHED_S = 0.1
# What a call may take beyond the time that the daemon was asked to hold it.
ANSWER_S = 5.0
# A daemon that does not hold calls is asked no more often than this.
ASK_EVERY_S = 0.05

RESPONSES: tuple[type[Message], ...] = (
    model_pb2.SwapModelResponse,
    model_pb2.ModelOperationResponse,
    node_pb2.CalibrateResponse,
    partition_pb2.ApplyLayoutResponse,
)


def operation_name(text: str) -> str:
    """`operations/<id>` from either that or `<id>`."""
    return text if text.startswith(PREFIX) else PREFIX + text


def operation_response(operation: Operation) -> Message | None:
    """The unpacked response of an operation that succeeded, else None."""
    if operation.WhichOneof("result") != "response":
        return None
    for kind in RESPONSES:
        message = kind()
        if operation.response.Unpack(message):
            return message
    return None


class Operations:
    """The operations of one daemon."""

    def __init__(self, connection: Connection, *, clock: Clock, reconnect_s: float) -> None:
        self._connection = connection
        self._clock = clock
        self._reconnect_s = reconnect_s
        self._stub = connection.stub(operations_pb2_grpc.OperationsStub)

    def get(self, name: str) -> Operation:
        """Where an operation stands."""
        request = GetOperationRequest(name=operation_name(name))
        operation: Operation = self._connection.call(self._stub.GetOperation, request)
        return operation

    def list(self) -> Iterator[Operation]:
        """All operations that the daemon remembers."""
        request = ListOperationsRequest(name="operations")
        for page in self._connection.pages(self._stub.ListOperations, request):
            yield from page.operations

    def cancel(self, name: str) -> None:
        """Ask an operation to stop. Raises Conflict when it has passed the point where it can."""
        request = CancelOperationRequest(name=operation_name(name))
        self._connection.call(self._stub.CancelOperation, request)

    def wait(
        self,
        operation: Operation | str,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[Operation], None] | None = None,
    ) -> Operation:
        """Wait until an operation has ended; its final state.

        `on_update` is called with each state seen. Raises OperationFailed when it ended with an
        error, and StillRunning when `timeout_s` passed first.
        """
        seen = operation if isinstance(operation, Operation) else self.get(operation)
        until = None if timeout_s is None else self._clock.monotonic() + timeout_s
        outage = Outage(self._clock, self._reconnect_s, answered=self._connection.answered)
        hold_s = HOLD_S if on_update is None else HOLD_WATCHED_S
        while True:
            if on_update is not None:
                on_update(seen)
            if seen.done:
                break
            left_s = hold_s if until is None else until - self._clock.monotonic()
            if left_s <= 0:
                raise StillRunning(f"{seen.name} still runs after {timeout_s:g} s", operation=seen)
            try:
                seen = self._ask(seen.name, min(hold_s, left_s))
            except (Unreachable, Unavailable, CallTimedOut) as error:
                outage.pause(error, until=until)
            else:
                outage.over()
        failure = operation_error(seen)
        if failure is not None:
            raise failure
        return seen

    def _ask(self, name: str, hold_s: float) -> Operation:
        """One WaitOperation call that the daemon may hold for `hold_s`."""
        begun = self._clock.monotonic()
        request = WaitOperationRequest(name=name, timeout=duration(hold_s))
        seen: Operation = self._connection.call(
            self._stub.WaitOperation, request, timeout_s=hold_s + ANSWER_S
        )
        took_s = self._clock.monotonic() - begun
        if not seen.done and took_s < min(hold_s, ASK_EVERY_S):
            self._clock.sleep(min(hold_s, ASK_EVERY_S) - took_s)
        return seen


def duration(seconds: float) -> duration_pb2.Duration:
    """A protobuf Duration of `seconds`."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def duration_or_none(seconds: float | None) -> duration_pb2.Duration | None:
    """A protobuf Duration, or None to leave the field unset."""
    return None if seconds is None else duration(seconds)
