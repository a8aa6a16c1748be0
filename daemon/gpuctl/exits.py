"""Exit codes of gpuctl: what a script learns without reading a word.

One table, from the client's errors to numbers. It never prints, and importing it loads neither grpc
nor protobuf. The numbers are an interface: they keep their meaning.
"""

from __future__ import annotations

from enum import IntEnum

from hotbay import errors
from hotbay.reasons import Code


class Exit(IntEnum):
    """What became of a command."""

    OK = 0
    # The operation failed and was rolled back, or the daemon could not do it.
    FAILED = 1
    # The command or one of its arguments makes no sense.
    USAGE = 2
    # The model, partition or operation does not exist.
    NOT_FOUND = 3
    # The state of things forbids it, or somebody else is at it.
    CONFLICT = 4
    DENIED = 5
    # No daemon answers, or it is starting or stopping.
    UNREACHABLE = 6
    # No memory, quota or queue is left for it.
    NO_CAPACITY = 7
    # The time given is over; the operation goes on.
    TIMED_OUT = 8
    # The operation failed, and what was before could not be restored.
    NOT_ROLLED_BACK = 9
    # Ctrl-C: the command left; an operation goes on.
    DETACHED = 130


class Check(IntEnum):
    """Exit codes of `status --check`, as monitoring systems read them."""

    OK = 0
    WARNING = 1
    CRITICAL = 2


BY_ERROR: tuple[tuple[type[errors.HotbayError], Exit], ...] = (
    (errors.EndpointInvalid, Exit.USAGE),
    (errors.InvalidArgument, Exit.USAGE),
    (errors.NotFound, Exit.NOT_FOUND),
    (errors.Conflict, Exit.CONFLICT),
    (errors.Denied, Exit.DENIED),
    (errors.Unreachable, Exit.UNREACHABLE),
    (errors.Unavailable, Exit.UNREACHABLE),
    (errors.NoCapacity, Exit.NO_CAPACITY),
    (errors.StillRunning, Exit.TIMED_OUT),
    (errors.CallTimedOut, Exit.TIMED_OUT),
)


def exit_of(error: errors.HotbayError) -> Exit:
    """The exit code of an error.

    A failed operation says first whether things are as they were; after that only a lack of room
    is told apart, because a script can do something about it.
    """
    if isinstance(error, errors.OperationFailed):
        if not error.rolled_back:
            return Exit.NOT_ROLLED_BACK
        return Exit.NO_CAPACITY if error.code is Code.RESOURCE_EXHAUSTED else Exit.FAILED
    for kind, code in BY_ERROR:
        if isinstance(error, kind):
            return code
    return Exit.FAILED
