"""The health of a GPU or GPU instance: its states, and what one incident asks for.

Pure: an enum, a transition table and one function for the states; `join` for what belongs to one
incident; `verdict` for what may follow once nothing runs there. It never talks to a driver, a
worker or a clock. The invariants: a unit becomes HEALTHY by proof alone; the driver's own word wins
over the table's; reports within the correlation window of an incident are part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from partitioner.partition import Partition
from partitioner.recovery_action import RecoveryAction
from partitioner.xid_table import Action

ATTEMPTS_MAX = 3
"""Proofs that may fail before an operator is asked for."""
XIDS_KEPT_MAX = 16


class HealthState(StrEnum):
    """Where a unit stands."""

    HEALTHY = "healthy"
    TAINTED = "tainted"  # Something was reported; nothing new is sent there.
    DRAINING = "draining"  # Running requests finish or are paused.
    RECOVERING = "recovering"  # Waiting for the driver's word, or for workers that start again.
    PROVING = "proving"  # Workers are to show that they serve.
    NEEDS_OPERATOR = "needs_operator"  # Nothing that the daemon may do mends it.


class Happening(StrEnum):
    """What changes it."""

    REPORTED = "reported"
    DRAIN_BEGUN = "drain_begun"
    DRAINED = "drained"
    RECOVERED = "recovered"
    BLOCKED = "blocked"
    PROVEN = "proven"
    DISPROVEN = "disproven"
    CLEARED = "cleared"


_S, _H = HealthState, Happening
TRANSITIONS: Mapping[tuple[HealthState, Happening], HealthState] = MappingProxyType(
    {
        (_S.HEALTHY, _H.REPORTED): _S.TAINTED,
        (_S.TAINTED, _H.REPORTED): _S.TAINTED,
        (_S.DRAINING, _H.REPORTED): _S.DRAINING,
        (_S.RECOVERING, _H.REPORTED): _S.RECOVERING,
        (_S.PROVING, _H.REPORTED): _S.TAINTED,  # It may have been given requests again.
        (_S.NEEDS_OPERATOR, _H.REPORTED): _S.NEEDS_OPERATOR,
        (_S.TAINTED, _H.DRAIN_BEGUN): _S.DRAINING,
        (_S.DRAINING, _H.DRAINED): _S.RECOVERING,
        (_S.RECOVERING, _H.RECOVERED): _S.PROVING,
        (_S.RECOVERING, _H.BLOCKED): _S.NEEDS_OPERATOR,
        (_S.PROVING, _H.PROVEN): _S.HEALTHY,
        (_S.PROVING, _H.DISPROVEN): _S.RECOVERING,
        (_S.NEEDS_OPERATOR, _H.CLEARED): _S.PROVING,
    }
)


def after(state: HealthState, happening: Happening) -> HealthState:
    """The state that follows; a pair that is not in the table is a bug."""
    following = TRANSITIONS.get((state, happening))
    if following is None:
        raise ValueError(f"a unit that is {state.value} cannot be {happening.value}")
    return following


@dataclass(frozen=True, order=True)
class Unit:
    """A GPU, or with `place` a GPU instance of it."""

    gpu: str
    index: int
    place: str = ""

    @property
    def name(self) -> str:
        """As its partition is called."""
        return f"gpu{self.index}/{self.place}" if self.place else f"gpu{self.index}"

    def covers(self, partition: Partition) -> bool:
        """Whether trouble here is trouble of that partition."""
        if partition.gpu_uuid != self.gpu:
            return False
        own = self.name
        return not self.place or partition.id == own or partition.id.startswith(f"{own}/")


@dataclass(frozen=True)
class Report:
    """One thing that was told of a unit. `by_driver`: by its recovery action, not by our table."""

    unit: Unit
    at_s: float
    action: Action
    reason: str
    xid: int = 0
    by_driver: bool = False
    patient: bool = False
    """What runs there may go on to its end."""


@dataclass(frozen=True)
class Incident:
    """All that was reported of a unit since it was healthy, and what that comes to."""

    action: Action
    reason: str
    begun_s: float
    last_s: float
    by_driver: bool = False
    patient: bool = False
    xids: tuple[int, ...] = ()


def join(incident: Incident | None, report: Report, window_s: float) -> Incident:
    """The incident with one more report. The driver's word counts for the whole window."""
    if incident is None:
        return Incident(
            report.action,
            report.reason,
            report.at_s,
            report.at_s,
            report.by_driver,
            report.patient,
            (report.xid,) if report.xid else (),
        )
    xids = (*incident.xids, report.xid) if report.xid else incident.xids
    joined = replace(incident, last_s=report.at_s, xids=xids[-XIDS_KEPT_MAX:])
    stronger = report.action.strength > incident.action.strength
    told = replace(
        joined,
        action=report.action,
        reason=report.reason if stronger else incident.reason,
        by_driver=report.by_driver,
        patient=report.patient,
    )
    if report.by_driver:
        # Whatever only people can see, such as a cable, the driver does not take back.
        return told if stronger or incident.action.by_driver else joined
    believed = incident.by_driver and report.action.by_driver
    within = report.at_s - incident.last_s <= window_s
    return told if stronger and not (believed and within) else joined


def driver_action(told: RecoveryAction) -> Action:
    """What a driver's recovery action is in the words of the table."""
    if told is RecoveryAction.NONE:
        return Action.RESTART
    if told in (RecoveryAction.NODE_REBOOT, RecoveryAction.SYSTEM_REBOOT):
        return Action.REBOOT
    if told in (RecoveryAction.DRAIN_P2P, RecoveryAction.RECOVER_IMEX):
        return Action.OPERATOR
    return Action.RESET


def verdict(
    incident: Incident,
    told: RecoveryAction | None,
    *,
    lost: bool,
    attempts: int,
    now_s: float,
    window_s: float,
) -> Happening | None:
    """What follows once nothing runs on the unit: proof, an operator, or (None) waiting.

    `told` is the driver's recovery action now, None where it does not know the field.
    """
    if lost or attempts >= ATTEMPTS_MAX or incident.action is Action.OPERATOR:
        return Happening.BLOCKED
    if told is not None and told is not RecoveryAction.NONE:
        return Happening.BLOCKED
    if incident.action.by_driver:
        if told is None:
            return Happening.BLOCKED
        # It asks for nothing so far; within the window it still may.
        waited = now_s - incident.last_s >= window_s
        return Happening.RECOVERED if waited or incident.by_driver else None
    return Happening.RECOVERED


def cleared(incident: Incident, told: RecoveryAction | None, *, lost: bool, attempts: int) -> bool:
    """Whether a unit that waits for an operator shows by itself that he has acted."""
    asks = told is not None and told is not RecoveryAction.NONE
    driver_only = incident.by_driver or incident.action is Action.RESTART
    return driver_only and not lost and not asks and attempts < ATTEMPTS_MAX


def absorb(incident: Incident, other: Incident, window_s: float) -> Incident | None:
    """A GPU's incident with that of an instance of it; None where they are two."""
    if abs(incident.begun_s - other.last_s) > window_s:
        return None
    xids = (*other.xids, *incident.xids)[-XIDS_KEPT_MAX:]
    return replace(incident, xids=xids, begun_s=min(incident.begun_s, other.begun_s))
