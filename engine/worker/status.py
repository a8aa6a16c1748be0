"""Where a model stands on this worker, and which changes of that there are.

Owns the table of transitions and the one function that applies it; it never does anything to a
model. The statuses are the link's words, so that what is reported is what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.link.control import EngineStatus
from engine.worker.errors import InvalidState

STANDBY, STAGED = EngineStatus.STANDBY, EngineStatus.STAGED
ACTIVE, DRAINING, FAILED = EngineStatus.ACTIVE, EngineStatus.DRAINING, EngineStatus.FAILED

TRANSITIONS: Mapping[EngineStatus, frozenset[EngineStatus]] = {
    # Weights were copied to the device; or they could not be, on the way back of a rollback.
    STANDBY: frozenset({STAGED, FAILED}),
    # It serves; or its pages were given back.
    STAGED: frozenset({ACTIVE, STANDBY, FAILED}),
    ACTIVE: frozenset({DRAINING, FAILED}),
    # Nothing runs any more; or the drain was called off.
    DRAINING: frozenset({STAGED, ACTIVE, FAILED}),
    # It has nothing on the device; the next load makes it anew.
    FAILED: frozenset(),
}


def advance(model: str, now: EngineStatus, then: EngineStatus) -> EngineStatus:
    """The status after a change. Raises InvalidState for a change that does not exist."""
    if then not in TRANSITIONS[now]:
        possible = ", ".join(sorted(TRANSITIONS[now])) or "nothing else"
        raise InvalidState(
            f"{model} is {now} and cannot become {then}, but {possible}",
            model=model,
            status=now,
        )
    return then
