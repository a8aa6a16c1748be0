"""Cached prefixes have pages only for as long as nobody else wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.link.control import InFlight
from engine.worker.snapshot import take_snapshot
from tests.worker.preserving import TOKENS_PER_PAGE, Bench, Model, make_large

WEIGHTS_PAGES, FLOOR_PAGES = 3, 4
PROMPT_TOKENS = 3 * TOKENS_PER_PAGE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    return [
        make_large("a@1", tmp_path_factory.mktemp("a"), "llama", 1),
        make_large("b@1", tmp_path_factory.mktemp("b"), "qwen3", 2),
        make_large("c@1", tmp_path_factory.mktemp("c"), "llama", 3),
    ]


@pytest.fixture
def bench(models: list[Model]) -> Iterator[Callable[[int], Bench]]:
    made: list[Bench] = []

    def make(pages: int) -> Bench:
        made.append(Bench(models, pages, parking_bytes=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def serve(bench: Bench, model: Model, first: int, count: int = 1) -> None:
    """Answer `count` long prompts that begin differently, one after the other."""
    for number in range(count):
        prompt = [first + number, *range(PROMPT_TOKENS - 1)]
        bench.submit(model, [token % 200 for token in prompt], 4)
        bench.run(lambda: not any(one.open for one in bench.sent.values()))


def hits(bench: Bench, model: Model) -> int:
    return bench.resident(model).state().prefix_hit_tokens_total


def free(bench: Bench) -> int:
    return take_snapshot(bench.residency, "", None).pages_free


def test_they_count_as_free_and_stay_while_there_is_room(
    bench: Callable[[int], Bench], models: list[Model]
) -> None:
    a, b, _ = models
    one = bench(60)
    one.swap(None, a)
    before = free(one)
    serve(one, a, 0, count=4)
    state = one.resident(a).state()
    assert state.cached_bytes > FLOOR_PAGES * one.pool.page_bytes
    assert (free(one), state.kv_bytes) == (before, FLOOR_PAGES * one.pool.page_bytes)
    assert one.stage(b).error == ""
    assert one.swap(None, b).error == ""
    serve(one, a, 0, count=4)
    # Nothing had to go for b, so that everything was found but each last token.
    assert hits(one, a) == 4 * (PROMPT_TOKENS - 1)
    one.finish()


@pytest.mark.parametrize("stage", [True, False])
def test_they_give_way_to_a_model_that_comes(
    bench: Callable[[int], Bench], models: list[Model], stage: bool
) -> None:
    a, b, _ = models
    one = bench(2 * (WEIGHTS_PAGES + FLOOR_PAGES))
    one.swap(None, a)
    serve(one, a, 0, count=3)
    assert one.pool.free_pages < WEIGHTS_PAGES + FLOOR_PAGES
    cached = one.resident(a).state().cached_bytes
    assert (one.stage(b) if stage else one.swap(None, b)).error == ""
    assert one.resident(a).state().cached_bytes < cached
    assert a.key in one.active()
    serve(one, a, 0, count=3)
    one.finish()


def test_they_give_way_before_weights_that_nobody_needs_now(
    bench: Callable[[int], Bench], models: list[Model]
) -> None:
    a, b, c = models
    one = bench(3 * WEIGHTS_PAGES + 2 * FLOOR_PAGES + 8)
    one.swap(None, a)
    one.swap(None, b)
    assert one.stage(c).error == ""
    serve(one, a, 0, count=5)
    cached = one.resident(a).state().cached_bytes
    assert (one.pool.free_pages, one.staged()) == (0, [c.key])
    for number in range(3):
        one.submit(b, [number, *range(PROMPT_TOKENS - 1)], 4)
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    assert one.resident(a).state().cached_bytes < cached
    assert one.staged() == [c.key]
    assert one.resident(b).state().preemptions_total == 0
    one.finish()


@pytest.mark.parametrize("in_flight", [InFlight.PRESERVE, InFlight.RECOMPUTE])
def test_a_swap_keeps_those_in_pages_of_preserved_requests_alone(
    bench: Callable[[int], Bench], models: list[Model], in_flight: InFlight
) -> None:
    a, b, _ = models
    one = bench(60)
    one.swap(None, a)
    serve(one, a, 0, count=2)
    one.submit(a, list(range(100, 100 + TOKENS_PER_PAGE)), 30)
    one.step(4)
    assert one.swap(a, b, in_flight).error == ""
    state = one.resident(a).state()
    preserved = in_flight is InFlight.PRESERVE
    assert (state.paused, state.cached_bytes > 0) == (int(preserved), preserved)
    assert one.swap(b, a).error == ""
    before = hits(one, a)
    serve(one, a, 0, count=2)
    assert (hits(one, a) > before) == preserved
    one.finish()
