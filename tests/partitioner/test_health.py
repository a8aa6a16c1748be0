"""The states of a unit, what belongs to one incident, and what the table of XIDs says."""

from __future__ import annotations

import itertools
import random

import pytest

from partitioner.errors import DocumentError
from partitioner.health import (
    ATTEMPTS_MAX,
    TRANSITIONS,
    XIDS_KEPT_MAX,
    Happening,
    HealthState,
    Incident,
    Report,
    Unit,
    absorb,
    after,
    cleared,
    driver_action,
    join,
    verdict,
)
from partitioner.partition import Partition, PartitionKind
from partitioner.recovery_action import RecoveryAction
from partitioner.xid_table import Action, Scope, load_xids, parse_xids

GPU = Unit("GPU-a", 0)
WINDOW_S = 30.0
NONE, RESET = RecoveryAction.NONE, RecoveryAction.GPU_RESET


def report(at_s: float, action: Action, xid: int = 0, *, by_driver: bool = False) -> Report:
    return Report(GPU, at_s, action, f"{action.value} at {at_s:g}", xid, by_driver)


def joined(*reports: Report) -> Incident:
    incident = None
    for each in reports:
        incident = join(incident, each, WINDOW_S)
    assert incident is not None
    return incident


def judged(
    incident: Incident,
    told: RecoveryAction | None = NONE,
    *,
    lost: bool = False,
    attempts: int = 0,
    now_s: float = 0.0,
) -> Happening | None:
    return verdict(incident, told, lost=lost, attempts=attempts, now_s=now_s, window_s=WINDOW_S)


# The states.


def test_the_straight_way_leads_back_to_healthy() -> None:
    state = HealthState.HEALTHY
    for happening in ("reported", "drain_begun", "drained", "recovered", "proven"):
        state = after(state, Happening(happening))
    assert state is HealthState.HEALTHY


def test_only_proof_makes_healthy_and_every_state_is_left() -> None:
    into = {pair for pair, to in TRANSITIONS.items() if to is HealthState.HEALTHY}
    assert into == {(HealthState.PROVING, Happening.PROVEN)}
    # A report is never an error, and never makes a unit healthy.
    assert {state for state, what in TRANSITIONS if what is Happening.REPORTED} == set(HealthState)
    reached = {HealthState.HEALTHY}
    for _ in HealthState:
        reached |= {to for (state, _), to in TRANSITIONS.items() if state in reached}
    assert reached == set(HealthState)


def test_any_walk_stays_within_the_table() -> None:
    chance, state = random.Random(7), HealthState.HEALTHY
    for _ in range(2000):
        happening = chance.choice(list(Happening))
        if (state, happening) in TRANSITIONS:
            state = after(state, happening)
        else:
            with pytest.raises(ValueError, match=state.value):
                after(state, happening)


# One incident.


def test_the_drivers_word_wins_over_the_tables_either_way() -> None:
    table, driver = report(0, Action.RESET, 109), report(5, Action.RESTART, 154, by_driver=True)
    weaker = joined(table, driver)
    assert (weaker.action, weaker.by_driver, weaker.xids) == (Action.RESTART, True, (109, 154))
    stronger = joined(report(0, Action.RESTART, 94), report(5, Action.RESET, 154, by_driver=True))
    assert (stronger.action, stronger.by_driver) == (Action.RESET, True)
    # Also when the driver spoke first, within the window.
    before = joined(report(0, Action.RESTART, 154, by_driver=True), report(29, Action.RESET, 109))
    assert (before.action, before.xids) == (Action.RESTART, (154, 109))
    later = joined(report(0, Action.RESTART, 154, by_driver=True), report(31, Action.RESET, 109))
    assert (later.action, later.by_driver) == (Action.RESET, False)


def test_the_driver_does_not_plug_a_cable_in() -> None:
    incident = joined(
        report(0, Action.OPERATOR, 54), report(1, Action.RESTART, 154, by_driver=True)
    )
    assert incident.action is Action.OPERATOR
    assert judged(incident) is Happening.BLOCKED


@pytest.mark.parametrize("order", list(itertools.permutations((94, 109, 31))))
def test_of_table_entries_the_strongest_counts_in_any_order(order: tuple[int, ...]) -> None:
    table = load_xids()
    incident = joined(*(report(at, table.rule(xid).action, xid) for at, xid in enumerate(order)))
    assert (incident.action, incident.xids, incident.begun_s) == (Action.RESET, order, 0)


def test_an_incident_does_not_grow_for_ever() -> None:
    incident = joined(*(report(at, Action.RESTART, 94) for at in range(100)))
    assert len(incident.xids) == XIDS_KEPT_MAX


def test_a_gpus_incident_takes_those_of_its_instances_along() -> None:
    instance = joined(report(0, Action.RESTART, 94))
    gpu = joined(report(20, Action.RESET, 154, by_driver=True))
    one = absorb(gpu, instance, WINDOW_S)
    assert one is not None
    assert (one.action, one.xids, one.begun_s) == (Action.RESET, (94, 154), 0)
    assert absorb(gpu, instance, 10.0) is None


# What follows.


def test_what_needs_only_a_restart_is_proven_at_once() -> None:
    incident = joined(report(0, Action.RESTART, 94))
    assert judged(incident) is Happening.RECOVERED
    assert judged(incident, None) is Happening.RECOVERED
    assert judged(incident, attempts=ATTEMPTS_MAX) is Happening.BLOCKED
    assert judged(incident, lost=True) is Happening.BLOCKED
    assert judged(incident, RESET) is Happening.BLOCKED


def test_a_reset_of_the_tables_waits_for_the_drivers_word() -> None:
    incident = joined(report(0, Action.RESET, 109))
    assert judged(incident, now_s=29.0) is None
    assert judged(incident, now_s=30.0) is Happening.RECOVERED
    assert judged(incident, RESET, now_s=1.0) is Happening.BLOCKED
    # A driver that tells nothing leaves the table as the only word.
    assert judged(incident, None, now_s=1.0) is Happening.BLOCKED


def test_who_waits_for_an_operator_sees_what_the_driver_takes_back() -> None:
    by_driver = joined(report(0, Action.RESET, 154, by_driver=True))
    assert not cleared(by_driver, RESET, lost=False, attempts=0)
    assert not cleared(by_driver, NONE, lost=True, attempts=0)
    assert cleared(by_driver, NONE, lost=False, attempts=0)
    assert not cleared(by_driver, NONE, lost=False, attempts=ATTEMPTS_MAX)
    # Blocked by nothing but the driver's word about the GPU around it.
    assert cleared(joined(report(0, Action.RESTART, 94)), NONE, lost=False, attempts=0)
    assert not cleared(joined(report(0, Action.RESET, 109)), NONE, lost=False, attempts=0)


@pytest.mark.parametrize("told", list(RecoveryAction))
def test_every_word_of_a_driver_is_an_action(told: RecoveryAction) -> None:
    assert (driver_action(told) is Action.RESTART) == (told is NONE)
    assert RecoveryAction.of(int(told)) is told
    assert RecoveryAction.of(99) is RecoveryAction.NODE_REBOOT


# Which partitions it concerns.


def test_a_gpu_covers_all_and_an_instance_its_own() -> None:
    def partition(name: str, gpu: str = "GPU-a") -> Partition:
        return Partition(name, PartitionKind.MIG, gpu, 0, 0, 0, 0)

    instance = Unit("GPU-a", 0, "1g.18gb@0")
    assert instance.name == "gpu0/1g.18gb@0"
    assert GPU.covers(partition("gpu0"))
    assert GPU.covers(partition("gpu0/1g.18gb@0"))
    assert not GPU.covers(partition("gpu0", "GPU-b"))
    assert instance.covers(partition("gpu0/1g.18gb@0"))
    assert instance.covers(partition("gpu0/1g.18gb@0/mps0"))
    assert not instance.covers(partition("gpu0/1g.18gb@1"))
    assert not instance.covers(partition("gpu0"))


# The table.


def test_the_table_says_what_the_facts_say() -> None:
    table = load_xids()
    expected = {
        13: Action.RESTART, 31: Action.RESTART, 94: Action.RESTART, 43: Action.IGNORE,
        63: Action.IGNORE, 92: Action.IGNORE, 48: Action.RESET, 95: Action.RESET,
        109: Action.RESET, 119: Action.RESET, 154: Action.RESET, 79: Action.REBOOT,
        54: Action.OPERATOR,
    }  # fmt: skip
    assert {xid: table.rule(xid).action for xid in expected} == expected
    assert len(table.rules) > 90
    assert table.rule(999) is table.unknown
    for xid, rule in table.rules.items():
        if rule.action.by_driver:
            assert rule.scope is Scope.GPU, f"a reset of XID {xid} takes every instance along"


def test_a_table_with_two_rules_for_one_xid_is_refused_at_its_line() -> None:
    row = "{{xids: [{}], meaning: m, action: {}, scope: gpu, sure: low, source: ours}}"
    head = "version: 1\nunknown: " + row.format("", "restart") + "\nxids:\n"
    text = head + "- " + row.format("5", "reset") + "\n- " + row.format("5", "restart") + "\n"
    with pytest.raises(DocumentError, match="line 5: XID 5 has two rules"):
        parse_xids(text, "x.yaml")
    with pytest.raises(DocumentError, match=r"x\.yaml"):
        parse_xids(text.replace("reset", "explode"), "x.yaml")
