"""The pure parts of dispatching: the hold queue's order and bound, and demand."""

from __future__ import annotations

import time
from typing import Any

from daemon.gateway.hold import HoldQueue
from daemon.gateway.streams import Mailbox, Stream
from daemon.gateway.table import Table, build_table
from daemon.gateway.unfinished import Unfinished
from engine.link.routes import Disposition, GatewayLimits, Route, SetTable
from engine.link.tokens import Sampling


def stream(serial: int, model: str = "a@1", age_s: float = 0.0) -> Stream:
    return Stream(
        serial=serial,
        index=0,
        model=model,
        prompt=(1,),
        sampling=Sampling(max_tokens=1),
        priority=0,
        cache_salt="",
        mailbox=Mailbox(eager=True),
        arrived_s=time.monotonic() - age_s,
    )


def table(**dispositions: Disposition) -> Table:
    routes: list[Any] = [
        Route(f"{name}@1", name, 1, True, "/models", 64, "STANDBY", disposition)
        for name, disposition in dispositions.items()
    ]
    return build_table(SetTable(1, tuple(routes), (), GatewayLimits(1.0, 1)))


def test_a_replayed_stream_has_its_old_place() -> None:
    queue = HoldQueue(2)
    first, second, third = stream(1), stream(2), stream(3)
    queue.add(second)
    assert not queue.full
    queue.add(third)
    assert queue.full
    queue.add(first)  # a replay was admitted before, and is not turned away
    assert queue.of("a@1") == [first, second, third]
    assert len(queue) == 3
    assert queue.models() == ("a@1",)
    for held in (second, first, third):
        queue.remove(held)
    assert not queue.holds("a@1")
    assert queue.of("a@1") == []
    assert len(queue) == 0


def test_models_wait_apart() -> None:
    queue = HoldQueue(9)
    queue.add(stream(1, "a@1"))
    queue.add(stream(2, "b@1"))
    assert [held.serial for held in queue.of("b@1")] == [2]
    assert queue.holds("a@1")
    assert not queue.holds("c@1")


def test_demand_is_what_is_unfinished_and_not_served() -> None:
    unfinished = Unfinished()
    streams = [stream(1, "a@1"), stream(2, "b@1"), stream(3, "a@1"), stream(4, "c@1")]
    for one in streams:
        unfinished.add(one)
    unfinished.table_changed(table(a=Disposition.HOLD, b=Disposition.SERVE))
    (found,) = unfinished.demand()  # b is served, and nobody registered c
    assert (found.model, found.requests) == ("a@1", 2)
    for one in (streams[0], streams[2]):
        unfinished.remove(one)
    assert unfinished.demand() == ()
    assert [one.serial for one in unfinished] == [2, 4]


def test_waiting_counts_from_arrival_or_from_when_serving_ended() -> None:
    unfinished = Unfinished()
    unfinished.add(stream(1, age_s=100.0))  # ran for long before its model was taken off
    unfinished.table_changed(table(a=Disposition.SERVE))
    unfinished.table_changed(table(a=Disposition.HOLD))
    assert unfinished.demand()[0].oldest_s < 10
    unfinished.table_changed(table(a=Disposition.SERVE))
    assert unfinished.demand() == ()
    unfinished.table_changed(table(a=Disposition.HOLD))
    before = unfinished.demand()[0].oldest_s
    unfinished.table_changed(table(a=Disposition.HOLD))  # a new table is no new beginning
    assert unfinished.demand()[0].oldest_s >= before
