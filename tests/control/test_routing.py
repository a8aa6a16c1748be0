"""What becomes of a request for a model in each state of affairs."""

from __future__ import annotations

import pytest

from daemon.control.actions.routing import disposition
from daemon.control.state.records import Failure, Placement
from engine.link.routes import Disposition

PLACED = Placement("prose@1", "gpu0")
DRAINED = Placement("prose@1", "gpu0", drained=True)
BROKEN = Failure("CHECKPOINT_INVALID", "tensor x is missing")
NO_ROOM = Failure("INSUFFICIENT_DEVICE_MEMORY", "needs 9 bytes")


@pytest.mark.parametrize(
    ("serving", "placement", "failure", "refusal", "on_demand", "expected", "why"),
    [
        ("gpu0", PLACED, None, None, True, Disposition.SERVE, ""),
        ("gpu0", None, None, None, False, Disposition.SERVE, ""),
        ("gpu0", PLACED, BROKEN, NO_ROOM, True, Disposition.SERVE, ""),
        ("", PLACED, None, None, False, Disposition.HOLD, "moved"),
        ("", PLACED, BROKEN, None, True, Disposition.HOLD, "moved"),
        ("", DRAINED, None, None, True, Disposition.HOLD, "resume"),
        ("", None, None, None, True, Disposition.HOLD, "brought up"),
        ("", None, None, None, False, Disposition.HOLD, "swap_on_demand is off"),
        ("", None, BROKEN, None, True, Disposition.REFUSE, "tensor x is missing"),
        ("", None, None, NO_ROOM, True, Disposition.REFUSE, "needs 9 bytes"),
    ],
)
def test_disposition(
    serving: str,
    placement: Placement | None,
    failure: Failure | None,
    refusal: Failure | None,
    on_demand: bool,
    expected: Disposition,
    why: str,
) -> None:
    chosen, reason = disposition(serving, placement, failure, refusal, on_demand)
    assert chosen is expected
    assert why in reason
