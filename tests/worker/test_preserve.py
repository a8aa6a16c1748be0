"""Requests that are paused for a swap and go on afterwards: the same tokens, nothing lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.link.control import EngineStatus, InFlight
from engine.parking import KvLane
from engine.worker.failpoints import FailPoint
from swap.errors import InsufficientDeviceMemory
from tests.worker.conftest import Model
from tests.worker.preserving import PAGE, Bench, make_large

MIB = 1 << 20
PROMPTS = [[(7 * seed + 3 * place) % 211 for place in range(20 + 9 * seed)] for seed in range(6)]
COUNTS = (40, 70, 25, 90, 60, 33)
POLICIES = (InFlight.PRESERVE, InFlight.PRESERVE, InFlight.DRAIN, InFlight.RECOMPUTE)
FAILURES = (
    FailPoint.PLANNED,
    FailPoint.DRAINED,
    FailPoint.EVICTED,
    FailPoint.COPYING,
    FailPoint.COPIED,
    FailPoint.COMMITTING,
)


@pytest.fixture(scope="session")
def poem(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_large("poem@1", tmp_path_factory.mktemp("poem"), "llama", 11)


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_large("tale@1", tmp_path_factory.mktemp("tale"), "qwen3", 12)


@pytest.fixture
def bench(poem: Model, tale: Model, prose: Model) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(pages: int, parking_bytes: int, **values: Any) -> Bench:
        made.append(Bench([poem, tale, prose], pages, parking_bytes, **values))
        return made[-1]

    yield make
    for one in made:
        one.close()


def begin(bench: Bench, model: Model, steps: int = 20) -> list[int]:
    """Bring a model in with six requests, as many under way as there are pages for."""
    assert bench.swap(None, model).error == ""
    numbers = [bench.submit(model, *pair) for pair in zip(PROMPTS, COUNTS, strict=True)]
    bench.step(steps)
    assert bench.resident(model).engine.running > 2
    return numbers


def computed(bench: Bench, model: Model) -> int:
    return bench.resident(model).state().computed_tokens_total


NEEDED = sum(len(prompt) + count - 1 for prompt, count in zip(PROMPTS, COUNTS, strict=True))
"""Tokens that go through the model when nothing is computed twice: the last one drawn does not."""


def test_kv_stays_on_the_device_where_there_is_room(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(32, 64 * MIB)
    begin(one, poem)
    ledger = one.swap(poem, tale).ledger
    assert (ledger.requests_kept, ledger.requests_preserved, ledger.parked_bytes) == (6, 6, 0)
    state = one.resident(poem).state()
    assert (state.status, state.weights_bytes) == (EngineStatus.STANDBY, 0)
    assert (state.paused, state.parked, state.running, state.waiting) == (6, 0, 0, 6)
    assert state.kv_bytes > 0
    assert one.swap(tale, poem).ledger.unpark_ms == 0
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert computed(one, poem) == NEEDED
    one.finish()


def test_what_does_not_fit_is_parked_and_comes_back(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(12, 64 * MIB, link_bytes_per_s=400 * MIB)
    begin(one, poem)
    ledger = one.swap(poem, tale).ledger
    assert (ledger.requests_kept, ledger.requests_preserved) == (6, 6)
    assert ledger.parked_bytes > 0
    assert ledger.park_ms > 0
    state = one.resident(poem).state()
    assert state.parked > 0
    assert state.paused + state.parked == state.waiting == 6
    assert one.area_bytes == state.parked_bytes == ledger.parked_bytes
    one.submit(tale, PROMPTS[0], 30)
    one.step(5)
    back = one.swap(tale, poem).ledger
    assert back.unpark_ms > 0
    one.run(lambda: all(not sent.open for sent in one.sent.values() if sent.model is poem))
    assert computed(one, poem) == NEEDED
    assert one.resident(poem).state().parked_bytes == 0
    one.finish()


def test_with_too_little_parking_the_newest_compute_theirs_again(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(12, 4 * MIB)
    numbers = begin(one, poem)
    ledger = one.swap(poem, tale).ledger
    assert ledger.requests_kept == 6
    assert 0 < ledger.requests_preserved < 6
    assert 0 < one.area_bytes <= 4 * MIB
    waiting = {request.id: request for request in one.resident(poem).engine._scheduler.waiting}
    kept = [waiting[number].parked is not None for number in numbers if number in waiting]
    assert kept == sorted(kept, reverse=True), "the oldest are kept"
    one.swap(tale, poem)
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert computed(one, poem) > NEEDED
    one.finish()


def test_recompute_drops_the_kv_as_before(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(32, 64 * MIB)
    begin(one, poem)
    ledger = one.swap(poem, tale, InFlight.RECOMPUTE).ledger
    assert (ledger.requests_kept, ledger.requests_preserved) == (6, 0)
    assert one.resident(poem).pages == 0
    one.finish()


@pytest.mark.parametrize("parking_bytes", [0, 64 * MIB])
def test_a_serving_model_takes_the_pages_of_a_paused_one(
    bench: Callable[..., Bench], poem: Model, tale: Model, parking_bytes: int
) -> None:
    one = bench(14, parking_bytes)
    begin(one, poem)
    assert one.swap(poem, tale).ledger.parked_bytes == 0
    kept = one.resident(poem).pages
    assert kept > 0
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        one.submit(tale, prompt, count)
    one.run(lambda: all(not sent.open for sent in one.sent.values() if sent.model is tale))
    assert one.resident(poem).pages < kept
    assert one.resident(tale).state().preemptions_total == 0
    assert (one.area_bytes > 0) == (parking_bytes > 0)
    one.finish()


def test_a_third_model_is_not_refused_because_of_paused_pages(
    bench: Callable[..., Bench], poem: Model, tale: Model, prose: Model
) -> None:
    one = bench(15, 64 * MIB)
    begin(one, poem)
    one.swap(poem, tale)
    assert one.pool.free_pages < one.residency.residents[tale.key].pages_min
    one.swap(None, prose)
    assert sorted(one.active()) == [prose.key, tale.key]
    one.check()
    # What is promised to two models that serve is not lent: the third one is refused by figures.
    with pytest.raises(InsufficientDeviceMemory):
        one.swap(None, poem)
    one.finish()


def test_cancelling_and_unloading_what_is_parked_frees_its_bytes(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(9, 64 * MIB)
    numbers = begin(one, poem, steps=60)
    one.swap(poem, tale)
    before = one.area_bytes
    assert before > 0
    alive = [number for number in numbers if one.sent[number].open]
    one.cancel(alive[0])
    assert one.area_bytes < before
    one.check()
    for number in alive[1:]:
        one.sent[number].cancelled = True
        one.desk.leave(number)  # their answers are not of interest here
    one.residency.detach(poem.image.digest).close()
    assert one.area_bytes == 0
    assert poem.key not in one.residency.residents
    one.check()


def test_requests_cancelled_while_they_are_being_parked(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(9, 64 * MIB, link_bytes_per_s=100 * MIB)
    numbers = begin(one, poem)

    def cancel() -> None:
        for number in numbers[::2]:
            if one.sent[number].open:
                one.cancel(number)

    ledger = one.swap(poem, tale, during=cancel).ledger
    assert ledger.parked_bytes > 0
    one.check()
    one.finish()


@pytest.mark.parametrize("point", FAILURES)
def test_a_swap_that_fails_half_way_goes_on_with_what_was_preserved(
    bench: Callable[..., Bench], poem: Model, tale: Model, point: FailPoint
) -> None:
    one = bench(12, 64 * MIB)
    begin(one, poem)
    if point is FailPoint.PLANNED:
        with pytest.raises(Exception, match="planned"):
            one.swap(poem, tale, fail_at=point)
    else:
        assert one.swap(poem, tale, fail_at=point).rolled_back
    assert one.active() == [poem.key]
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert computed(one, poem) == NEEDED
    one.finish()


def test_kv_that_cannot_be_copied_out_is_computed_again(
    bench: Callable[..., Bench], poem: Model, tale: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench(9, 64 * MIB)
    begin(one, poem)
    copy_out, copied = KvLane.copy_out, []

    def breaks(self: KvLane, block: int, address: int) -> None:
        copied.append(block)
        if len(copied) > 3:
            raise OSError("the link is down")
        copy_out(self, block, address)

    monkeypatch.setattr(KvLane, "copy_out", breaks)
    ledger = one.swap(poem, tale).ledger
    assert ledger.requests_preserved < 6
    monkeypatch.undo()
    one.check()
    one.finish()


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
            fail_at = draw.choice(FAILURES[1:]) if draw.random() < 0.25 else None
            try:
                one.swap(outgoing, draw.choice(away), draw.choice(POLICIES), fail_at=fail_at)
            except InsufficientDeviceMemory:
                assert outgoing is None or len(active) > 1, "one model alone always fits"
        one.resubmit()
    else:
        one.step(draw.randrange(30))
    one.check()


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_swaps_ends_with_the_tokens_that_would_have_come(
    bench: Callable[..., Bench], seed: int
) -> None:
    draw = random.Random(seed)
    one = bench(
        draw.choice([8, 9, 12, 16, 24]),
        draw.choice([0, 2 * MIB, 8 * MIB, 64 * MIB]),
        link_bytes_per_s=draw.choice([None, 1000 * MIB]),
        draw=draw,
    )
    for _ in range(60):
        happen(one, draw)
    assert any(sent.tokens for sent in one.sent.values())
    one.finish()
    assert one.device.statistics().pages_total == one.pool.free_pages
    assert one.pool.page_bytes == PAGE
