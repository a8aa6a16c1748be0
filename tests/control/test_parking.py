"""How much KV a move would push out, by what a worker told of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from daemon.control.state.history import Past
from daemon.control.state.parking import Holdings
from daemon.control.state.planning import PartitionView, Resident, plan_move
from engine.link.control import EngineState, EngineStatus, InFlight

PAGE = 2 << 20


def engine(model: str, weights: int, kv: int, used: int, **values: Any) -> EngineState:
    values.setdefault("status", EngineStatus.ACTIVE)
    return EngineState(
        model,
        "digest",
        weights_bytes=weights * PAGE,
        kv_bytes=kv * PAGE,
        kv_used_bytes=used * PAGE,
        **values,
    )


def holdings(free: int, *engines: EngineState, room: int = 100) -> Holdings:
    return Holdings(PAGE, free, room * PAGE, engines)


def parked(held: Holdings, weights: int, kv_min: int, *, preserved: bool = True) -> int:
    """In pages, for a model that comes in for the one named `out`."""
    found = held.parked_bytes(("out",), "in", weights * PAGE, kv_min * PAGE, preserved=preserved)
    assert found % PAGE == 0
    return found // PAGE


OUT = engine("out", 4, 6, 5, running=3)


@pytest.mark.parametrize(
    ("free", "weights", "preserved", "pages"),
    [
        (0, 4, True, 0),  # the outgoing weights and the page of KV that nobody uses are enough
        (0, 5, True, 5),  # one page is missing: requests side by side go together
        (1, 5, True, 0),
        (0, 5, False, 0),  # nothing is kept
    ],
)
def test_kv_is_parked_only_when_weights_and_free_pages_are_short(
    free: int, weights: int, preserved: bool, pages: int
) -> None:
    assert parked(holdings(free, OUT), weights, 1, preserved=preserved) == pages


def test_what_the_incoming_model_has_already_is_not_missing() -> None:
    kept = engine("in", 2, 2, 1, status=EngineStatus.STANDBY, paused=1)
    assert parked(holdings(0, OUT), 7, 1) == 5
    assert parked(holdings(0, OUT, kept), 7, 1) == 0


def test_spare_weights_go_first_then_the_kv_of_those_whose_turn_is_over() -> None:
    spare = engine("spare", 2, 0, 0, status=EngineStatus.STAGED, spare=True)
    waiting = engine("waiting", 0, 3, 3, status=EngineStatus.STANDBY, paused=1)
    serving = engine("serving", 9, 9, 9, running=4)
    assert parked(holdings(0, OUT, spare, serving), 6, 1) == 0
    assert parked(holdings(0, OUT, waiting, serving), 6, 1) == 3
    assert parked(holdings(0, OUT, waiting, serving), 9, 1) == 8


def test_no_more_is_foreseen_than_host_memory_takes_or_runs() -> None:
    assert parked(holdings(0, OUT, room=2), 5, 1) == 2
    idle = engine("out", 4, 6, 5)
    assert parked(holdings(0, idle), 5, 1) == 0


def test_a_plan_tells_it_and_takes_its_time_into_account() -> None:
    out, incoming = Resident("out", 4 * PAGE, PAGE), Resident("in", 5 * PAGE, PAGE)
    view = PartitionView("gpu0", PAGE, 10, PAGE * 1000.0, (out,), holdings=holdings(0, OUT))
    view = dataclasses.replace(view, past=Past(PAGE * 1000.0, out_bytes_per_s=PAGE * 500.0))
    plan = plan_move(view, ("out",), incoming, 0, in_flight=InFlight.PRESERVE)
    assert (plan.parked_bytes, plan.predicted_ms) == (5 * PAGE, pytest.approx(10))
    for in_flight, timeout_s in (
        (InFlight.RECOMPUTE, 0.0),
        (InFlight.ABORT, 0.0),
        (InFlight.DRAIN, 5.0),
        (None, 0.0),
    ):
        other = plan_move(view, ("out",), incoming, 0, timeout_s, in_flight)
        assert (other.parked_bytes, other.predicted_ms) == (0, pytest.approx(5))
    at_once = plan_move(view, ("out",), incoming, 0, 0.0, InFlight.DRAIN)
    assert at_once.parked_bytes == 5 * PAGE
