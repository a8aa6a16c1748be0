"""Predictions from what was measured, and links as they were calibrated."""

from __future__ import annotations

import pytest

from daemon.control.state.history import SAMPLES_MAX, History, Past, Sample, link_rate
from daemon.control.state.records import LinkRate
from engine.link.control import Ledger


def ledger(copied_bytes: int, copy_ms: float, **phases: float) -> Ledger:
    total_ms = copy_ms + sum(phases.values()) + 1.0
    return Ledger(copied_bytes=copied_bytes, copy_ms=copy_ms, total_ms=total_ms, **phases)


def test_without_a_past_the_link_is_what_counts() -> None:
    past = History().past("gpu0", 2e9)
    assert past.predict_ms(10**9, busy=True, drain_timeout_s=10) == pytest.approx(500)
    assert past.predict_ms(0, busy=False, drain_timeout_s=10) == 0


def test_copies_of_like_size_drains_of_like_load_and_all_else_are_medians() -> None:
    history = History()
    for copy_ms in (90.0, 100.0, 400.0):
        history.note("gpu0", ledger(1000, copy_ms, evict_ms=2.0, verify_ms=3.0), busy=False)
    history.note("gpu0", ledger(100_000, 100.0, drain_ms=800.0, evict_ms=5.0), busy=True)
    history.note("gpu0", ledger(0, 0.0, evict_ms=1.0), busy=False)
    past = history.past("gpu0", 1e9)
    assert past.predict_ms(1000, busy=False, drain_timeout_s=10) == pytest.approx(106)
    # Of a size that was not seen yet: all rates count; nobody waits longer than the timeout.
    assert past.predict_ms(1000, busy=True, drain_timeout_s=0.5) == pytest.approx(606)
    assert past.predict_ms(200_000, busy=True, drain_timeout_s=10) == pytest.approx(200 + 800 + 6)
    # A staged model's swap copies nothing, and has medians of its own.
    assert past.predict_ms(0, busy=False, drain_timeout_s=10) == pytest.approx(2)
    assert history.past("gpu1", 1e9).samples == ()


def test_what_is_remembered_is_bounded() -> None:
    history = History()
    for number in range(3 * SAMPLES_MAX):
        history.note("gpu0", ledger(1000, float(number + 1)), busy=False)
    samples = history.past("gpu0", 1e9).samples
    assert len(samples) == SAMPLES_MAX
    assert samples[-1] == Sample(1000, 3.0 * SAMPLES_MAX, 0.0, 1.0, False)


@pytest.mark.parametrize(
    ("calibrated", "measured", "rate"),
    [(0.0, 5.0, 5.0), (5.0, 0.0, 5.0), (5.0, 5.5, 5.5), (5.5, 5.0, 5.5), (10.0, 5.0, 5.0)],
)
def test_the_better_figure_counts_unless_the_link_has_changed(
    calibrated: float, measured: float, rate: float
) -> None:
    assert link_rate(calibrated, measured) == rate
    past = History([LinkRate("gpu0", calibrated, 1.0)]).past("gpu0", measured)
    assert past == Past(rate)


def test_parking_counts_where_it_takes_longer_than_the_copy_beside_it() -> None:
    past = History([LinkRate("gpu0", 1e9, 1.0, out_bytes_per_s=5e8)]).past("gpu0", 1e9)

    def predicted(copy_bytes: int, parked_bytes: int) -> float:
        return past.predict_ms(copy_bytes, busy=False, drain_timeout_s=0, parked_bytes=parked_bytes)

    assert predicted(10**9, 4 * 10**8) == predicted(10**9, 0) == pytest.approx(1000)
    assert predicted(10**9, 10**9) == pytest.approx(2000)
    # Without a calibration the way out is taken to be as fast as the way in.
    unknown = History().past("gpu0", 1e9)
    assert unknown.predict_ms(
        10**8, busy=False, drain_timeout_s=0, parked_bytes=10**9
    ) == pytest.approx(1000)


def test_parking_is_predicted_at_the_rate_it_went_and_spoils_no_copys_rate() -> None:
    history = History([LinkRate("gpu0", 1e9, 1.0, out_bytes_per_s=5e8)])
    history.note("gpu0", ledger(1000, 100.0), busy=False)
    # Its copy stood still until pages fell free; the ledger's total has the longer of the two.
    parked = Ledger(
        copied_bytes=1000, copy_ms=390.0, park_ms=400.0, parked_bytes=800, total_ms=401.0
    )
    history.note("gpu0", parked, busy=False)
    past = history.past("gpu0", 1e9)
    assert past.samples[-1].fixed_ms == pytest.approx(1.0)
    assert past.predict_ms(1000, busy=False, drain_timeout_s=0) == pytest.approx(101)
    assert past.predict_ms(1000, busy=False, drain_timeout_s=0, parked_bytes=400) == pytest.approx(
        201
    )


def test_requests_are_kept_where_drains_used_to_last_as_long_as_they_may() -> None:
    history = History()
    assert history.past("gpu0", 1e9).drained_within(1.0)
    assert not history.past("gpu0", 1e9).drained_within(0.0)
    history.note("gpu0", ledger(1000, 1.0, drain_ms=1000.0), busy=True)
    assert not history.past("gpu0", 1e9).drained_within(1.0)
    assert history.past("gpu0", 1e9).drained_within(1.5)
