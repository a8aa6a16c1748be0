"""From an exception to what is journalled and answered: a reason, a sentence, figures.

This is the only place that knows the error trees of the packages underneath. It never raises and
never logs. The invariant: a reason that leaves here is one of the catalogue in `hotbay.reasons`.
"""

from __future__ import annotations

from hotbay.reasons import Reason, known

from daemon.control.errors import ControlError
from daemon.control.state.records import Failure
from engine.link.errors import CallTimedOut, LinkError
from swap.errors import SwapError


def failure_of(error: BaseException) -> Failure:
    """What to say of an exception; anything unforeseen is INTERNAL, in its own words."""
    if isinstance(error, ControlError | SwapError):
        reason = known(error.reason)
        if reason is not None:
            return Failure(reason.value, str(error), dict(error.metadata))
        return Failure(
            Reason.INTERNAL.value, str(error), {**error.metadata, "reason": error.reason}
        )
    if isinstance(error, CallTimedOut):
        return Failure(Reason.TIMED_OUT.value, str(error))
    if isinstance(error, LinkError):
        return Failure(Reason.WORKER_CRASHED.value, str(error))
    return Failure(Reason.INTERNAL.value, f"{type(error).__name__}: {error}")


class Failed(ControlError):
    """A failure met again, for instance one that was journalled."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, reason=failure.reason, metadata=failure.metadata)
