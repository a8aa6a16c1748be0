"""The parts of a change, timed: they follow each other and add up."""

from __future__ import annotations

from daemon.control.actions.phases import Phases, timed
from daemon.control.state.records import AppliedLayout, Result
from daemon.control.state.running import Outcome


def test_each_part_begins_where_the_last_one_ended() -> None:
    times = iter((10.0, 10.5, 12.0))
    phases = Phases(lambda: next(times))
    phases.end("drain")
    phases.end("cut")
    assert phases.milliseconds == {"drain": 500.0, "cut": 1500.0}
    outcome = timed(Outcome(Result("", "ACTIVE", layout=AppliedLayout(moved=("a@1",)))), phases)
    layout = outcome.result.layout
    assert layout is not None
    assert (layout.moved, sum(layout.phases_ms.values())) == (("a@1",), 2000.0)
