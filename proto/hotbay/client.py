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

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from google.longrunning.operations_proto_pb2 import Operation

from hotbay.connection import Connection
from hotbay.host_calls import HostCalls
from hotbay.layout_calls import LayoutCalls
from hotbay.model_calls import ModelCalls
from hotbay.operations import Operations
from hotbay.patience import Clock, SystemClock
from hotbay.v1 import watch_pb2
from hotbay.watching import watch

CALL_TIMEOUT_S = 10.0
RECONNECT_S = 30.0


class Client(HostCalls, LayoutCalls, ModelCalls):
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
        connection = Connection(endpoint, timeout_s=timeout_s)
        HostCalls.__init__(self, connection)
        LayoutCalls.__init__(self, connection)
        ModelCalls.__init__(self, connection)
        self._operations = Operations(connection, clock=self._clock, reconnect_s=reconnect_s)

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
