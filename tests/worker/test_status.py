"""The table of statuses, walked whole."""

from __future__ import annotations

from itertools import product

import pytest

from engine.link.control import EngineStatus
from engine.worker.errors import InvalidState
from engine.worker.status import TRANSITIONS, advance

ALLOWED = {
    ("STANDBY", "STAGED"),
    ("STANDBY", "FAILED"),
    ("STAGED", "ACTIVE"),
    ("STAGED", "STANDBY"),
    ("STAGED", "FAILED"),
    ("ACTIVE", "DRAINING"),
    ("ACTIVE", "FAILED"),
    ("DRAINING", "STAGED"),
    ("DRAINING", "ACTIVE"),
    ("DRAINING", "FAILED"),
}


@pytest.mark.parametrize(("now", "then"), list(product(EngineStatus, repeat=2)))
def test_every_pair_of_statuses(now: EngineStatus, then: EngineStatus) -> None:
    if (now.value, then.value) in ALLOWED:
        assert advance("m@1", now, then) is then
    else:
        with pytest.raises(InvalidState, match=f"m@1 is {now} and cannot become {then}"):
            advance("m@1", now, then)


def test_every_status_has_its_row() -> None:
    assert set(TRANSITIONS) == set(EngineStatus)
