"""Whatever happens to a worker, in any order: the tokens that would have come, nothing lost."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from engine.link.control import Canary, InFlight
from engine.worker.errors import InvalidState
from engine.worker.failpoints import Action, FailPoint
from swap.errors import InsufficientDeviceMemory
from tests.worker.conftest import Model
from tests.worker.preserving import PAGE, Bench
from tests.worker.test_preserve import COUNTS, MIB, PROMPTS

POLICIES = (InFlight.PRESERVE, InFlight.PRESERVE, InFlight.DRAIN, InFlight.RECOMPUTE)
ANYWHERE = [one for one in FailPoint if one not in (FailPoint.PLANNED, FailPoint.STAGING)]


def happen(one: Bench, draw: random.Random) -> None:
    """One thing that can happen to a worker, at random."""
    models = list(one.models.values())
    what = draw.random()
    if what < 0.45:
        model = draw.choice(models)
        if sum(sent.open for sent in one.sent.values()) < 12:
            index = draw.randrange(6)
            one.submit(model, PROMPTS[index], COUNTS[index])
    elif what < 0.5:
        alive = [number for number, sent in one.sent.items() if sent.open]
        if alive:
            one.cancel(draw.choice(alive))
    elif what < 0.8:
        active = [one.models[key] for key in one.active()]
        outgoing = draw.choice([*active, None]) if active else None
        away = [model for model in models if model not in active]
        if away:
            fail_at = draw.choice(ANYWHERE) if draw.random() < 0.3 else None
            try:
                result = one.swap(
                    outgoing,
                    draw.choice(away),
                    draw.choice(POLICIES),
                    fail_at=fail_at,
                    action=draw.choice([Action.RAISE, Action.HANG]),
                    canary=Canary((3, 1, 4)) if draw.random() < 0.2 else None,
                    keep_staged=draw.random() < 0.6,
                )
                # Weights that could have gone go before any KV is copied out.
                assert result.error or not (result.ledger.parked_bytes and one.staged())
            except InsufficientDeviceMemory:
                assert outgoing is None or len(active) > 1, "one model alone always fits"
        one.resubmit()
    elif what < 0.87:
        parked_bytes, gave_way = one.area_bytes, one.gave_way
        with contextlib.suppress(InsufficientDeviceMemory, InvalidState):
            bytes_max = draw.choice([0, PAGE, 2 * PAGE])
            one.stage(
                draw.choice(models),
                displace=draw.random() < 0.5,
                bytes_max=bytes_max,
                fail_at=FailPoint.STAGING if draw.random() < 0.3 else None,
                action=draw.choice([Action.RAISE, Action.HANG]),
            )
        assert one.area_bytes <= parked_bytes or one.gave_way != gave_way, "staging parks no KV"
    else:
        one.step(draw.randrange(30))
    one.check()


def test_any_sequence_of_swaps_ends_with_the_tokens_that_would_have_come(
    bench: Callable[..., Bench], verse: Model, sequence: int
) -> None:
    """With every policy but abort, short memory, failures anywhere, staging and packed images.

    `pytest --sequences 500 -k any_sequence_of_swaps` tries more of them.
    """
    draw = random.Random(sequence)
    one = bench(
        draw.choice([8, 9, 12, 16, 24]),
        draw.choice([0, 2 * MIB, 8 * MIB, 64 * MIB]),
        link_bytes_per_s=draw.choice([None, 1000 * MIB]),
        draw=draw,
        more=[verse] if sequence % 2 else [],
        strict=bool(sequence % 2),
    )
    one.residency.linked(draw.choice([0.0, 1000.0 * MIB]))
    for _ in range(70):
        happen(one, draw)
    assert any(sent.tokens for sent in one.sent.values())
    one.finish()
    assert one.device.statistics().pages_total == one.pool.free_pages
    assert one.pool.page_bytes == PAGE
