"""What is worth parking, by measured rates."""

from __future__ import annotations

import pytest

from engine.rates import Pace, Rates, worth_parking

MIB = 1 << 20


@pytest.mark.parametrize(
    ("tokens", "kv_bytes", "computed_tokens_per_s", "copied_bytes_per_s", "worth"),
    [
        (1000, 10 * MIB, 1000.0, 100.0 * MIB, True),  # 0.2 s of copies for 1 s of computing
        (1000, 10 * MIB, 10_000.0, 100.0 * MIB, False),
        (1000, 10 * MIB, 10_000.0, 1000.0 * MIB, True),
        (1000, 10 * MIB, 5000.0, 100.0 * MIB, False),  # as long: computing takes no memory
        (0, 0, 1000.0, 100.0 * MIB, False),
        (1000, 10 * MIB, 0.0, 100.0 * MIB, False),  # nothing is known of computing
        (1000, 10 * MIB, 1.0, 0.0, False),  # nor of copies
    ],
)
def test_worth_parking(
    tokens: int,
    kv_bytes: int,
    computed_tokens_per_s: float,
    copied_bytes_per_s: float,
    worth: bool,
) -> None:
    rates = Rates(computed_tokens_per_s, copied_bytes_per_s)
    assert worth_parking(tokens, kv_bytes, rates) is worth


def test_a_pace_follows_what_was_measured_last() -> None:
    pace = Pace()
    assert pace.per_s == 0.0
    pace.note(5, 0.0)
    assert pace.per_s == 0.0, "no time passed"
    for _ in range(50):
        pace.note(100, 1.0)
    assert pace.per_s == pytest.approx(100, rel=0.01)
    pace.note(200, 1.0)
    assert 100 < pace.per_s < 120
    for _ in range(50):
        pace.note(200, 1.0)
    assert pace.per_s == pytest.approx(200, rel=0.01)
