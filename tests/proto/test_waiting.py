"""Waiting for operations: to the end, for a time, through a restart of the daemon, not for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from google.longrunning.operations_proto_pb2 import Operation
from hotbay import errors
from hotbay.client import Client
from hotbay.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, Outage, SystemClock
from hotbay.reasons import Code, Reason
from hotbay.status import operation_metadata
from hotbay.v1 import model_pb2

from tests.support.clocks import ManualClock
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB, Refusal


def test_a_finished_operation_is_not_asked_about(node: ScriptedNode, client: Client) -> None:
    done = client.swap("prose", "code")
    asked = len(node.requests)
    assert client.wait(done) == done
    assert len(node.requests) == asked


def test_a_held_operation_is_waited_for_and_watched(node: ScriptedNode, client: Client) -> None:
    node.held = True
    begun = client.swap("prose", "code")
    seen: list[Operation] = []

    def look(operation: Operation) -> None:
        seen.append(operation)
        if len(seen) == 3:
            node.release(begun.name)

    done = client.wait(begun.name, on_update=look)
    assert done.done
    assert [one.done for one in seen] == [False] * (len(seen) - 1) + [True]
    assert operation_metadata(seen[0]).bytes_done == GIB // 4


def test_a_failed_operation_raises_with_its_reason(node: ScriptedNode, client: Client) -> None:
    node.outcome = Refusal(Reason.INSUFFICIENT_DEVICE_MEMORY, "does not fit", {"free_bytes": "1"})
    node.end_stage = model_pb2.OPERATION_STAGE_ROLLED_BACK
    with pytest.raises(errors.OperationFailed, match="does not fit") as caught:
        client.wait(client.load("code"))
    error = caught.value
    assert type(error) is errors.OperationFailed
    assert error.rolled_back
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "INSUFFICIENT_DEVICE_MEMORY")
    assert error.metadata == {"free_bytes": "1"}
    assert error.operation.name == "operations/0001"


def test_an_operation_that_ended_while_rolling_back_says_so(
    node: ScriptedNode, client: Client
) -> None:
    node.outcome = Refusal(Reason.EXCHANGE_FAILED, "both are gone")
    node.end_stage = model_pb2.OPERATION_STAGE_ROLLING_BACK
    with pytest.raises(errors.OperationFailed) as caught:
        client.wait(client.swap("prose", "code"))
    assert not caught.value.rolled_back


def test_a_cancelled_operation_is_told_apart(node: ScriptedNode, client: Client) -> None:
    node.held = True
    begun = client.swap("prose", "code")
    client.cancel(begun.name)
    with pytest.raises(errors.OperationCancelled) as caught:
        client.wait(begun)
    assert caught.value.reason == Reason.CANCELLED


def test_the_wait_ends_and_the_operation_goes_on(node: ScriptedNode, client: Client) -> None:
    node.held = True
    begun = client.swap("prose", "code")
    with pytest.raises(errors.StillRunning, match=r"still runs after 0\.05 s") as caught:
        client.wait(begun, timeout_s=0.05)
    assert caught.value.operation.name == begun.name
    assert not client.operation(begun.name).done


def test_a_wait_outlives_a_restart_of_the_daemon(node: ScriptedNode) -> None:
    node.held = True
    downtimes: list[float] = []

    def come_back_at_the_third_pause() -> None:
        downtimes.append(clock.now)
        if len(downtimes) == 3:
            node.start()
            node.release(begun.name)

    class RestartClock(ManualClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            SystemClock().sleep(seconds)  # a real daemon comes back in real time

    clock = RestartClock(come_back_at_the_third_pause)
    with Client(node.endpoint, timeout_s=5, clock=clock) as client:
        begun = client.swap("prose", "code")
        threading.Timer(0.05, node.stop).start()
        assert client.wait(begun).done
    assert len(downtimes) >= 3


def test_a_daemon_that_stays_away_is_given_up(node: ScriptedNode) -> None:
    node.held = True
    clock = ManualClock()
    with Client(node.endpoint, timeout_s=5, reconnect_s=30, clock=clock) as client:
        begun = client.swap("prose", "code")
        node.stop()
        with pytest.raises(errors.Unreachable):
            client.wait(begun)
    node.start()  # for the fixture to stop
    assert 30 <= clock.now - 100 < 30 + LONGEST_PAUSE_S


def test_a_daemon_that_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    clock = ManualClock()
    with (
        Client(f"unix:{tmp_path}/none.sock", clock=clock) as client,
        pytest.raises(errors.Unreachable),
    ):
        client.wait(Operation(name="operations/1"))
    assert clock.pauses == []


def test_pauses_double_up_to_a_bound_and_start_again_after_an_answer() -> None:
    clock = ManualClock()
    outage = Outage(clock, 30.0, answered=True)
    error = errors.Unreachable("away")
    for _ in range(7):
        outage.pause(error)
    assert clock.pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    outage.over()
    outage.pause(error)
    assert clock.pauses[-1] == FIRST_PAUSE_S


def test_a_pause_ends_with_the_callers_time() -> None:
    clock = ManualClock()
    outage = Outage(clock, 30.0, answered=True)
    outage.pause(errors.Unreachable("away"), until=clock.now + 0.01)
    assert clock.pauses == [pytest.approx(0.01)]
