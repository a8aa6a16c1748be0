"""Requests that are paused for a swap and go on afterwards: the same tokens, nothing lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from daemon.control.state.parking import Holdings
from engine.link.control import EngineStatus, InFlight
from engine.link.tokens import Finish
from engine.parking import KvLane
from engine.worker.failpoints import FailPoint
from swap.errors import InsufficientDeviceMemory
from tests.worker.conftest import Model
from tests.worker.preserving import PAGE, Bench

MIB = 1 << 20
PROMPTS = [[(7 * seed + 3 * place) % 211 for place in range(20 + 9 * seed)] for seed in range(6)]
COUNTS = (40, 70, 25, 90, 60, 33)
FAILURES = (
    FailPoint.PLANNED,
    FailPoint.DRAINED,
    FailPoint.EVICTED,
    FailPoint.COPYING,
    FailPoint.COPIED,
    FailPoint.COMMITTING,
)


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
    assert ledger.residue_bytes == one.resident(poem).pages * one.residency.pool.page_bytes > 0
    back = one.swap(tale, poem).ledger
    assert (back.unpark_ms, back.residue_bytes) == (0, 0)
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert computed(one, poem) == NEEDED
    one.finish()


def test_what_does_not_fit_is_parked_and_comes_back(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(12, 64 * MIB, link_bytes_per_s=400 * MIB)
    begin(one, poem)
    states = tuple(each.state() for each in one.residency.residents.values())
    holdings = Holdings(PAGE, one.pool.free_pages, 64 * MIB, states)
    ledger = one.swap(poem, tale).ledger
    assert (ledger.requests_kept, ledger.requests_preserved) == (6, 6)
    assert ledger.parked_bytes > 0
    assert ledger.park_ms > 0
    # A plan foresees no less, by what the worker told before: not every request has a block in the
    # pages that are given up.
    incoming = one.resident(tale)
    weights_bytes = incoming.weights.pages_max * PAGE
    kv_bytes = incoming.kv_pages_min * PAGE
    foreseen = holdings.parked_bytes((poem.key,), tale.key, weights_bytes, kv_bytes, preserved=True)
    assert ledger.parked_bytes <= foreseen <= 2 * ledger.parked_bytes
    state = one.resident(poem).state()
    assert state.parked > 0
    assert state.paused + state.parked == state.waiting == 6
    assert one.area_bytes == state.parked_bytes == ledger.parked_bytes
    one.submit(tale, PROMPTS[0], 30)
    one.step(5)
    assert one.swap(tale, poem).error == ""
    one.run(lambda: all(not sent.open for sent in one.sent.values() if sent.model is poem))
    assert one.resident(poem).engine.statistics().unparked_s > 0
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
    there = one.resident(tale)
    assert one.pool.free_pages < there.weights.pages_max + there.kv_pages_min
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


def test_a_model_that_leaves_stays_staged_with_its_kv_where_there_is_room(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(40, 64 * MIB)
    begin(one, poem)
    there = one.swap(poem, tale, keep_staged=True).ledger
    assert (there.requests_preserved, there.parked_bytes, there.evicted_bytes) == (6, 0, 0)
    state = one.resident(poem).state()
    assert (state.status, state.spare, state.paused) == (EngineStatus.STAGED, True, 6)
    assert state.weights_bytes == poem.image.manifest.weights_bytes
    back = one.swap(tale, poem, keep_staged=True).ledger
    assert (back.copied_bytes, back.unpark_ms, one.staged()) == (0, 0, [tale.key])
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert computed(one, poem) == NEEDED
    one.finish()


def test_staged_weights_give_way_before_kv_is_parked(
    bench: Callable[..., Bench], poem: Model, tale: Model, prose: Model
) -> None:
    seen = set()
    for pages in range(12, 30):
        one = bench(pages, 64 * MIB)
        begin(one, poem)
        with contextlib.suppress(InsufficientDeviceMemory):
            one.stage(prose, turns=0)
        ledger = one.swap(poem, tale, keep_staged=True).ledger
        assert ledger.requests_preserved == ledger.requests_kept > 3
        staged = one.staged()
        # The one that was staged, then the one that left, and KV after both.
        assert staged in ([], [poem.key], [poem.key, prose.key])
        assert not (staged and ledger.parked_bytes)
        seen.add((len(staged), ledger.parked_bytes > 0))
        if pages % 6 == 0:
            one.finish()
    assert seen == {(0, True), (0, False), (1, False), (2, False)}


def test_what_paused_requests_keep_is_not_spare(
    bench: Callable[..., Bench], poem: Model, tale: Model, prose: Model
) -> None:
    one = bench(9, 64 * MIB)
    begin(one, poem)
    one.swap(poem, prose)
    kept = one.resident(poem).pages_kept
    weights = one.resident(poem).weights.pages_max  # tale's, too
    assert one.pool.free_pages < weights <= one.pool.free_pages + kept
    for displace in (False, True):
        with pytest.raises(InsufficientDeviceMemory):
            one.stage(tale, displace=displace)
    assert (one.resident(poem).pages_kept, one.area_bytes) == (kept, 0)
    one.finish()


def test_what_gives_way_and_what_is_swapped_out_share_one_area(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(8, 64 * MIB)
    one.residency.linked(1e12)
    begin(one, poem, steps=1)
    one.run(lambda: one.resident(poem).state().parked > 0)
    gave_way_bytes = one.area_bytes
    left = sum(sent.open and bool(sent.tokens) for sent in one.sent.values())
    ledger = one.swap(poem, tale).ledger
    assert ledger.requests_preserved == ledger.requests_kept == left
    assert one.area_bytes == gave_way_bytes + ledger.parked_bytes
    one.submit(tale, PROMPTS[5], 40)
    one.swap(tale, poem)
    one.run(lambda: all(not sent.open for sent in one.sent.values() if sent.model is poem))
    state = one.resident(poem).state()
    assert state.preemptions_total == state.preemptions_parked_total > 0
    ended = [sent for sent in one.sent.values() if sent.model is poem and sent.finish]
    ended = [sent for sent in ended if sent.finish is not Finish.REQUEUE]
    assert computed(one, poem) == sum(len(sent.prompt) + sent.count - 1 for sent in ended)
    one.finish()


@pytest.mark.parametrize("pages", [1, 2])
def test_of_weights_that_are_staged_in_part_a_swap_copies_the_rest(
    bench: Callable[..., Bench], poem: Model, tale: Model, pages: int
) -> None:
    one = bench(40, 64 * MIB, link_bytes_per_s=100 * MIB)
    begin(one, poem)
    weights_bytes, part = tale.image.manifest.weights_bytes, pages * PAGE
    assert one.stage(tale, bytes_max=part - 1).ledger.copied_bytes == part  # in whole pages
    state = one.resident(tale).state()
    assert (state.status, state.spare) == (EngineStatus.STAGED, True)
    assert (state.staged_bytes, state.copy_bytes) == (part, weights_bytes - part)
    gate: list[int] = []
    one.submit(poem, PROMPTS[0], 3)
    there = one.swap(
        poem,
        tale,
        keep_staged=True,
        during=lambda: gate.append(one.resident(tale).weights.transfer.gate.landed_layers),  # type: ignore[union-attr]
    ).ledger
    assert (there.copied_bytes, there.staged_bytes) == (weights_bytes - part, part)
    spans = tale.image.manifest.layers
    assert gate[0] >= sum(span.offset_bytes + span.bytes <= part for span in spans) > 0
    one.submit(tale, PROMPTS[1], 20)
    one.finish()


def test_of_packed_weights_that_are_staged_in_part_a_swap_copies_the_rest(
    bench: Callable[..., Bench], poem: Model, verse: Model
) -> None:
    one = bench(40, 64 * MIB, more=[verse], strict=True)
    begin(one, poem)
    manifest = verse.image.manifest
    part = one.stage(verse, bytes_max=PAGE // 2).ledger.copied_bytes
    assert 0 < part < manifest.stored_bytes
    state, pages = one.resident(verse).state(), one.resident(verse).pages
    assert (state.status, state.copy_bytes) == (EngineStatus.STAGED, manifest.stored_bytes - part)
    assert PAGE // 2 <= state.staged_bytes < pages * PAGE
    more = one.stage(verse).ledger
    assert (more.copied_bytes, more.staged_bytes) == (state.copy_bytes, state.staged_bytes)
    # Given back page by page, whole pieces stay.
    assert one.residency.room.drop_spares(1) > 0
    left = one.resident(verse).state()
    assert 0 < left.staged_bytes <= (one.resident(verse).pages) * PAGE
    there = one.swap(poem, verse).ledger
    assert (there.copied_bytes, there.staged_bytes) == (left.copy_bytes, left.staged_bytes)
    one.submit(verse, PROMPTS[1], 20)
    one.finish()


def test_staging_goes_on_where_it_ended_and_pages_are_given_from_the_last_one(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(40, 64 * MIB)
    weights_bytes = tale.image.manifest.weights_bytes
    assert one.stage(tale, bytes_max=PAGE).ledger.copied_bytes == PAGE
    assert one.stage(tale, bytes_max=PAGE).ledger.copied_bytes == 0
    rest = one.stage(tale).ledger
    assert (rest.copied_bytes, rest.staged_bytes) == (weights_bytes - PAGE, PAGE)
    assert one.resident(tale).weights.whole
    begin(one, poem)
    for left in (2, 1, 0):
        free = one.pool.free_pages
        given_bytes = one.residency.room.drop_spares(1)
        assert (one.pool.free_pages, one.resident(tale).weights.staged_bytes) == (
            free + 1,
            left * PAGE,
        )
        assert given_bytes == min(weights_bytes, (left + 1) * PAGE) - left * PAGE
    assert one.resident(tale).status is EngineStatus.STANDBY
    one.stage(tale, bytes_max=2 * PAGE)
    assert one.swap(poem, tale).ledger.copied_bytes == weights_bytes - 2 * PAGE
    one.submit(tale, PROMPTS[1], 20)
    one.finish()
