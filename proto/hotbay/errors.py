"""Errors of the client.

    HotbayError
    ├── EndpointInvalid         the address cannot be used
    ├── Unreachable             nobody answers at the address
    ├── CallTimedOut            the answer did not come within the call's deadline
    ├── Refused                 the daemon answered with an error
    │   ├── InvalidArgument     INVALID_ARGUMENT
    │   ├── NotFound            NOT_FOUND
    │   ├── Conflict            ABORTED, FAILED_PRECONDITION, ALREADY_EXISTS, OUT_OF_RANGE
    │   ├── Denied              PERMISSION_DENIED, UNAUTHENTICATED
    │   ├── NoCapacity          RESOURCE_EXHAUSTED
    │   ├── Unavailable         UNAVAILABLE, from a daemon that runs
    │   ├── Unsupported         UNIMPLEMENTED
    │   └── ServerFailed        every other code
    ├── OperationFailed         an operation ended with an error
    │   └── OperationCancelled  ... because it was cancelled
    └── StillRunning            the wait ended, the operation goes on

Every one carries `reason` (a name of `hotbay.reasons`, or empty where no daemon spoke), `metadata`
(the figures, as text) and `code`. Importing this module loads neither grpc nor protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from hotbay.reasons import Code, known

if TYPE_CHECKING:
    from google.longrunning.operations_proto_pb2 import Operation


class HotbayError(Exception):
    """Anything the client raises on purpose."""

    default_code: ClassVar[Code] = Code.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: Code | None = None,
        reason: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.metadata = dict(metadata)

    @property
    def advice(self) -> str:
        """What the catalogue says the reader can do; empty for a reason it does not know."""
        entry = known(self.reason)
        return entry.advice if entry else ""


class EndpointInvalid(HotbayError):
    """The address of the daemon cannot be used as it is written."""

    default_code = Code.INVALID_ARGUMENT


class Unreachable(HotbayError):
    """Nobody answers at the address: the daemon does not run, or runs elsewhere."""

    default_code = Code.UNAVAILABLE


class CallTimedOut(HotbayError):
    """No answer within the deadline. A change may have begun: repeat it with its request_id."""

    default_code = Code.DEADLINE_EXCEEDED


class Refused(HotbayError):
    """The daemon answered with an error; `reason` says which."""


class InvalidArgument(Refused):
    """A field of the request is wrong; the message names it."""


class NotFound(Refused):
    """The model, partition, GPU or operation does not exist."""


class Conflict(Refused):
    """The state of things does not allow it, or somebody else is at it."""


class Denied(Refused):
    """The caller may not do this."""


class NoCapacity(Refused):
    """No memory, quota or queue is left for it; the metadata holds the figures."""


class Unavailable(Refused):
    """The daemon runs but cannot do it now; the same call may succeed later."""


class Unsupported(Refused):
    """This daemon cannot do it at all."""


class ServerFailed(Refused):
    """Something broke on the daemon's side."""


class OperationFailed(HotbayError):
    """An operation ended with an error.

    `operation` is its final state. `rolled_back` is true when everything is as it was before it.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: Operation,
        rolled_back: bool,
        code: Code | None = None,
        reason: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message, code=code, reason=reason, metadata=metadata)
        self.operation = operation
        self.rolled_back = rolled_back


class OperationCancelled(OperationFailed):
    """An operation ended because somebody cancelled it."""


class StillRunning(HotbayError):
    """The wait for an operation ended before the operation; `operation` is where it stands."""

    default_code = Code.DEADLINE_EXCEEDED

    def __init__(self, message: str, *, operation: Operation) -> None:
        super().__init__(message)
        self.operation = operation


REFUSALS: Mapping[Code, type[Refused]] = MappingProxyType(
    {
        Code.INVALID_ARGUMENT: InvalidArgument,
        Code.NOT_FOUND: NotFound,
        Code.ABORTED: Conflict,
        Code.FAILED_PRECONDITION: Conflict,
        Code.ALREADY_EXISTS: Conflict,
        Code.OUT_OF_RANGE: Conflict,
        Code.PERMISSION_DENIED: Denied,
        Code.UNAUTHENTICATED: Denied,
        Code.RESOURCE_EXHAUSTED: NoCapacity,
        Code.UNAVAILABLE: Unavailable,
        Code.UNIMPLEMENTED: Unsupported,
    }
)


def refusal(code: Code, message: str, *, reason: str = "", metadata: Mapping[str, str]) -> Refused:
    """The error that stands for an answer of `code`."""
    kind = REFUSALS.get(code, ServerFailed)
    return kind(message, code=code, reason=reason, metadata=metadata)
