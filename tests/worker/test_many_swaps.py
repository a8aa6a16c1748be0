"""Many swaps with failures mixed in, as long as a test may take, and what is held afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench import swap, swap_failures
from engine.link.control import InFlight
from engine.worker.errors import FailPointReached, OptionInvalid
from engine.worker.failpoints import Action, FailPoint, FailPoints, Trigger, parse_failpoints
from tests.support.devices import FAKE, KEPT, device_factory
from tests.worker.conftest import Model
from tests.worker.preserving import Bench

COUNT = 30
SWAPS_OVER_DRIVER = 60
EVENTS_MAX = 600
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


@pytest.mark.parametrize("kind", [FAKE, KEPT])
def test_swaps_with_failures_leave_the_driver_holding_what_it_held(
    poem: Model, tale: Model, prose: Model, kind: str
) -> None:
    models, draw = [poem, tale, prose], random.Random(5)
    points = [None, *(set(FailPoint) - {FailPoint.PLANNED, FailPoint.STAGING})]
    with device_factory(kind) as make:
        one = Bench(models, 12, 8 << 20, device=make(12))
        before, failed = one.device._driver.holdings(), 0
        del before["events"], before["handles"]  # made when they are needed first, and kept
        for number in range(SWAPS_OVER_DRIVER):
            away = [model for model in models if model.key not in one.active()]
            outgoing = [one.models[key] for key in one.active()]
            result = one.swap(
                outgoing[0] if outgoing else None,
                draw.choice(away),
                draw.choice([InFlight.PRESERVE, InFlight.RECOMPUTE]),
                fail_at=draw.choice(points),
                action=draw.choice([Action.RAISE, Action.HANG]),
                keep_staged=draw.random() < 0.5,
            )
            failed += bool(result.error)
            for key in one.active():
                one.submit(one.models[key], [3, 1, 4, number % 200], 6)
            one.step(draw.randrange(4))
            if number % 10 == 9:
                # In between everything ends, and images go and come anew.
                one.finish()
                one.sent.clear()
                for model in models:
                    one.detach(model)
                assert one.device._driver.holdings()["registrations"] == 0
                for model in models:
                    one.attach(model)
                held = one.device._driver.holdings()
                # As many as copies were ever under way at once; swaps make thousands.
                assert held.pop("events") < EVENTS_MAX
                assert held.pop("handles") == one.pool.total_pages
                assert held == before
        assert failed > SWAPS_OVER_DRIVER // 10
        one.close()


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
