"""No step maps or unmaps: pages are mapped ahead of need, kept, and taken by whoever needs them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from engine.worker.kv import SLACK_PAGES, FlooredKvSpace
from engine.worker.mapper import Mapper
from swap.arena import PagePool, Region
from swap.errors import DeviceError, SwapError
from swap.host_device import HostDevice
from tests.worker.conftest import Model
from tests.worker.preserving import PAGE, TOKENS_PER_PAGE, Bench, make_large


@pytest.fixture
def mapper() -> Mapper:
    return Mapper()


@pytest.fixture
def pool() -> Iterator[PagePool]:
    device = HostDevice(64 * PAGE)
    yield PagePool(device)
    device.close()


def settled(space: FlooredKvSpace) -> FlooredKvSpace:
    """As it is once the mapper has had time."""
    with contextlib.suppress(SwapError):
        space._region.settle()
    return space


def test_pages_are_mapped_before_they_are_needed_and_kept_for_the_next(pool, mapper) -> None:
    space = FlooredKvSpace(Region(pool, "KV", 64 * PAGE), None, mapper)
    space.set_floor(2)
    space.serve(True)
    assert settled(space).mapped == SLACK_PAGES
    calls = pool.device.statistics().map_calls
    assert space.grow(SLACK_PAGES) == SLACK_PAGES
    assert settled(space).mapped == 2 * SLACK_PAGES
    # What is unused is told as such, the page account is exact all the same.
    assert (space.unused(space.pages), pool.free_pages) == (SLACK_PAGES, 64 - 2 * SLACK_PAGES)
    space.shrink(SLACK_PAGES)
    assert (space.mapped, space.unused(space.pages)) == (2 * SLACK_PAGES, 2 * SLACK_PAGES - 2)
    for _ in range(10):
        space.grow(SLACK_PAGES)
        space.shrink(SLACK_PAGES)
    assert settled(space).mapped == 2 * SLACK_PAGES
    assert pool.device.statistics().map_calls <= calls + 1  # the one that was begun above
    space.release_unused()
    assert (space.mapped, pool.free_pages) == (2, 62)
    space.serve(False)
    space.set_floor(0)
    assert pool.free_pages == 64


def test_a_burst_beyond_the_slack_is_served_at_once(pool, mapper) -> None:
    space = FlooredKvSpace(Region(pool, "KV", 64 * PAGE), None, mapper)
    space.serve(True)
    assert space.grow(50) == 50
    assert settled(space).mapped == 50 + SLACK_PAGES
    assert space.grow(30) == 14
    assert pool.free_pages == 0
    assert space.grow(1) == 0
    space.shrink(64)
    space.serve(False)
    assert pool.free_pages == 64


def test_while_pages_change_hands_none_are_taken_ahead(pool, mapper) -> None:
    space = FlooredKvSpace(Region(pool, "KV", 64 * PAGE), None, mapper)
    mapper.paused = True
    space.serve(True)
    space.grow(3)
    assert (settled(space).mapped, space.unused(space.pages), pool.free_pages) == (3, 0, 61)
    mapper.paused = False
    space.grow(1)
    assert settled(space).mapped == 4 + SLACK_PAGES
    space.shrink(4)
    space.serve(False)


def test_what_cannot_be_mapped_ahead_is_given_back_and_tried_again(
    pool, mapper, monkeypatch, caplog
) -> None:
    space = FlooredKvSpace(Region(pool, "KV", 64 * PAGE), None, mapper)

    def refuse(address, pages):
        raise DeviceError("no memory left")

    monkeypatch.setattr(pool.device, "map", refuse)
    space.serve(True)
    settled(space)
    assert (space.mapped, space.unused(space.pages), pool.free_pages) == (0, 0, 64)
    with pytest.raises(DeviceError, match="no memory left"):
        space.grow(1)
    monkeypatch.undo()
    assert space.grow(1) == 1
    space.serve(False)
    space.shrink(1)
    assert pool.free_pages == 64


# Engines.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    return [
        make_large("a@1", tmp_path_factory.mktemp("a"), "llama", 1),
        make_large("b@1", tmp_path_factory.mktemp("b"), "qwen3", 2),
    ]


@contextlib.contextmanager
def counted(bench: Bench) -> Iterator[list[str]]:
    """What steps map and unmap; between steps the mapper has all the time it needs."""
    calls: list[str] = []
    stepping = threading.Event()
    device = bench.device
    real = {"map": device.map, "unmap": device.unmap}

    def watch(name):
        def call(*arguments):
            if stepping.is_set() and threading.current_thread() is threading.main_thread():
                calls.append(name)
            return real[name](*arguments)

        return call

    turn = bench.step

    def stepped(count: int = 1) -> None:
        for _ in range(count):
            for resident in bench.residency.residents.values():
                settled(resident._space)
            stepping.set()
            turn()
            stepping.clear()

    device.map, device.unmap, bench.step = watch("map"), watch("unmap"), stepped
    yield calls
    device.map, device.unmap, bench.step = real["map"], real["unmap"], turn


def test_no_step_maps_or_unmaps_whatever_comes_and_goes(large: list[Model]) -> None:
    model = large[0]
    bench = Bench(large, pages=40, parking_bytes=0)
    bench.swap(None, model)
    with counted(bench) as calls:
        for round_ in range(4):
            # From one request to more than the slack holds, at the pace of prefills.
            for number in range(1 + 3 * round_):
                bench.submit(model, [7, number, round_], 2 * TOKENS_PER_PAGE)
                bench.step(2)
            bench.run(lambda: not any(one.open for one in bench.sent.values()))
        assert bench.pool.owned_pages("a@1 KV") > 2 * SLACK_PAGES
        assert calls == []
    bench.finish()


def test_a_busy_model_grows_into_what_an_idle_one_does_not_use(large: list[Model]) -> None:
    idle, busy = large
    bench = Bench(large, pages=30, parking_bytes=0)
    bench.swap(None, idle)
    bench.swap(None, busy)
    bench.submit(idle, [1, 2, 3], 3 * TOKENS_PER_PAGE)
    bench.run(lambda: not any(one.open for one in bench.sent.values()))
    resident = bench.resident(idle)
    floor = resident.kv_pages_min
    settled(resident._space)
    assert resident.pages_unused > 0
    taken = bench.pool.owned_pages("a@1 KV")
    assert taken > floor
    for number in range(6):
        bench.submit(busy, [9, number], 3 * TOKENS_PER_PAGE)
    bench.run(lambda: not any(one.open for one in bench.sent.values()))
    # It was left what it was promised, and the other had the rest.
    assert bench.pool.owned_pages("a@1 KV") == floor < taken
    assert resident.pages_missing == 0
    bench.finish()


def test_slack_stands_in_no_exchanges_way(large: list[Model]) -> None:
    first, second = large
    # Exactly what both need at least, so that no page may stay with nobody.
    pages = 2 * (3 + 4)
    bench = Bench(large, pages=pages, parking_bytes=0)
    bench.swap(None, first)
    bench.submit(first, [1, 2, 3], TOKENS_PER_PAGE)
    bench.step(3)
    settled(bench.resident(first)._space)
    assert bench.resident(first).pages_unused > 0
    assert bench.swap(None, second).error == ""
    assert sorted(bench.active()) == ["a@1", "b@1"]
    bench.finish()
