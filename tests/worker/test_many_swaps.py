"""The benchmark that swaps many times with failures mixed in, for as long as a test may take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import swap, swap_failures
from engine.worker.errors import FailPointReached, OptionInvalid
from engine.worker.failpoints import Action, FailPoint, FailPoints, Trigger, parse_failpoints

COUNT = 30
EXACT = ("pages_in_use", "descriptors", "threads", "processes")


@pytest.mark.slow
def test_thirty_swaps_with_failures_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_failures, "SETTLE_SWAPS", 4)
    output = tmp_path / "failures.json"
    swap.main(["--count", f"{COUNT}", "--failures", "--output", str(output)])
    found = json.loads(output.read_text())["measurements"]
    before, after = found["before"], found["after"]
    # What allocators keep of memory shows only in a long run.
    for name in EXACT:
        assert after[name] <= before[name], name
    outcomes = found["outcomes"]
    assert outcomes["committed"] > 0
    assert sum(outcomes.values()) - outcomes["committed"] > 0


def test_a_share_fires_again_and_again_and_always_alike() -> None:
    def fired(text: str) -> list[int]:
        points, found = FailPoints(parse_failpoints(text)), []
        for number in range(400):
            try:
                points.reach(FailPoint.COPIED, lambda: None)
            except FailPointReached:
                found.append(number)
        return found

    often = fired("copied~0.1=raise")
    assert 20 <= len(often) <= 60
    assert fired("copied~0.1=raise") == often
    assert fired("copied+3=raise") == [3]
    late = fired("copied+300~0.5=raise")
    assert late
    assert min(late) >= 300
    assert parse_failpoints("evicted~0.5=hang") == {
        FailPoint.EVICTED: Trigger(Action.HANG, share=0.5)
    }
    for wrong in ("copied~often=raise", "copied~2=raise", "copied~-1=raise"):
        with pytest.raises(OptionInvalid):
            parse_failpoints(wrong)


def test_every_fail_point_is_in_the_mix() -> None:
    assert set(parse_failpoints(swap_failures.switched_on())) == set(FailPoint)
