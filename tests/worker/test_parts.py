"""Small parts of the worker: the mailbox, the floor under the KV, the order, the sample."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence

import pytest

from engine.link.control import Exchange, ExchangeResult, Stage, StageReached
from engine.worker import supervision
from engine.worker.errors import Abandoned, StageTimedOut
from engine.worker.images import Image
from engine.worker.kv import FlooredKvSpace
from engine.worker.mailbox import Mailbox, promise
from engine.worker.order import Order
from engine.worker.supervision import stage_deadline_s, supervise
from engine.worker.verify import (
    CHECKSUM_BYTES_MAX,
    PIECE_BYTES,
    sampled_pieces,
    sampled_tensors,
    verify_weights,
)
from swap.arena import PagePool, Region
from swap.errors import CorruptWeights, InsufficientDeviceMemory
from swap.host_device import HostDevice
from swap.transfer import Transfer
from tests.support.descriptors import open_descriptors
from tests.support.devices import FAKE, device_factory
from tests.worker.conftest import Model

PAGE = 2 << 20


WEIGHTS = 64 << 20


@pytest.fixture
def pool() -> Iterator[PagePool]:
    device = HostDevice(8 * PAGE)
    yield PagePool(device)
    device.close()


# Mailbox.


def test_mail_is_taken_in_order_and_wakes_the_sleeper() -> None:
    mailbox, taken = Mailbox(), []
    reader = threading.Thread(target=lambda: (mailbox.wait(None), taken.extend(mailbox.take())))
    reader.start()
    mailbox.post(lambda: taken.append("called"))
    reader.join(120)
    assert len(taken) == 1
    for number in range(5):
        mailbox.post(lambda number=number: taken.append(number))
    for mail in mailbox.take():
        mail()
    assert taken[1:] == [0, 1, 2, 3, 4]


def test_a_wake_is_not_lost_when_nobody_sleeps_yet() -> None:
    mailbox = Mailbox()
    mailbox.wake()
    mailbox.wait(None)  # returns, or the test times out
    assert mailbox.take() == []


def test_a_promise_cannot_be_cancelled() -> None:
    future = promise()
    assert not future.cancel()
    future.set_result(3)
    assert future.result() == 3


# KV.


def test_pages_under_the_floor_stay_when_the_engine_gives_its_own_back(pool: PagePool) -> None:
    region = Region(pool, "KV", 8 * PAGE)
    space = FlooredKvSpace(region)
    space.set_floor(2)
    assert (space.pages, space.mapped, pool.free_pages) == (0, 2, 6)
    assert space.grow(3) == 3
    assert (space.pages, space.mapped) == (3, 3)
    space.shrink(3)
    assert (space.pages, space.mapped, pool.free_pages) == (0, 2, 6)
    space.set_floor(0)
    assert (space.mapped, pool.free_pages) == (0, 8)
    region.release()


def test_what_the_device_has_not_after_all_is_gone_without() -> None:
    """Its driver may have less memory than the pool has pages: it says so, time and again."""
    with device_factory(FAKE) as make:
        device = make(8)
        pool, refusals = PagePool(device), []
        space = FlooredKvSpace(Region(pool, "KV", 8 * PAGE))
        real = device.map

        def count(address: int, pages: Sequence[int]) -> None:
            try:
                real(address, pages)
            except InsufficientDeviceMemory:
                refusals.append(len(pages))
                assert len(refusals) < 20, "it tries for ever"
                raise

        device.map = count
        device._driver.refuse.create_from = device._driver.calls["cuMemCreate"] + 3
        assert 0 < space.grow(8) <= 2
        assert (pool.free_pages, space.mapped) == (8 - space.pages, space.pages)
        while space.grow(8):
            pass
        assert space.pages == 2
        device._driver.refuse.create_from = None
        assert space.grow(8) == 6
        space.shrink(8)


def test_growing_brings_as_much_as_others_left(pool: PagePool) -> None:
    region = Region(pool, "KV", 8 * PAGE)
    space = FlooredKvSpace(region)
    space.set_floor(1)
    others = pool.take("others", 5)
    assert space.grow(8) == 3
    assert space.grow(1) == 0
    with pytest.raises(InsufficientDeviceMemory):
        space.set_floor(4)
    assert space.mapped == 3
    pool.give_back("others", others)
    space.shrink(2)
    assert space.pages == 1
    with pytest.raises(ValueError, match="give back"):
        space.shrink(2)
    space.set_floor(0)
    space.shrink(1)
    region.release()
    assert pool.free_pages == 8


# Order.


def make_order(stages: list[StageReached] | None = None) -> Order:
    request = Exchange(operation="op", drain_timeout_s=7.0)
    return Order(request, [].append if stages is None else stages.append)


def test_the_first_interruption_wins_and_none_has_effect_after_the_seal() -> None:
    order = make_order()
    assert order.interrupt(Abandoned("first"))
    assert order.interrupt(StageTimedOut("second"))
    with pytest.raises(Abandoned):
        order.seal()
    order.reopen()
    order.check()
    order.seal()
    assert not order.interrupt(Abandoned("late"))
    order.check()


def test_an_interruption_ends_a_hang() -> None:
    order = make_order()
    threading.Timer(0.01, order.interrupt, [Abandoned("enough")]).start()
    with pytest.raises(Abandoned, match="enough"):
        order.hang()


def test_stages_are_told_as_they_are_entered() -> None:
    stages: list[StageReached] = []
    order = make_order(stages)
    order.enter(Stage.DRAINING)
    order.enter(Stage.EVICTING)
    assert [reached.stage for reached in stages] == [Stage.DRAINING, Stage.EVICTING]


def test_deadlines_allow_for_the_drain_and_for_the_link() -> None:
    order = make_order()
    assert stage_deadline_s(order, 2.0, 1e9) == 2.0
    order.enter(Stage.DRAINING)
    assert stage_deadline_s(order, 2.0, 1e9) == 9.0


class Copying:
    """What is shown of a transfer: it is a quarter further at each look."""

    bytes_total = 100

    def __init__(self) -> None:
        self.looks = 0
        self.cancelled = False

    @property
    def bytes_done(self) -> int:
        self.looks += 1
        return min(100, 25 * self.looks)

    def cancel(self) -> None:
        self.cancelled = True


def test_progress_is_told_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PROGRESS_INTERVAL_S", 0.001)
    order, told = make_order(), []
    order.copying(Copying())

    def tell(progress: StageReached) -> None:
        told.append(progress.bytes_done)
        if progress.bytes_done == 100:
            order.done.set_result(ExchangeResult("op", "", ""))

    asyncio.run(supervise(order, 60.0, 1e9, tell, wake=pytest.fail, stuck=pytest.fail))
    assert told == [50, 75, 100]


def test_a_stage_that_overruns_is_interrupted_with_its_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "PROGRESS_INTERVAL_S", 0.001)
    order, copying = make_order(), Copying()
    order.copying(copying)
    order.enter(Stage.EVICTING)

    def wake() -> None:
        with pytest.raises(StageTimedOut, match="EVICTING of exchange op took over"):
            order.check()
        order.done.set_result(ExchangeResult("op", "", ""))

    asyncio.run(supervise(order, 0.01, 1e9, lambda progress: None, wake, pytest.fail))
    assert copying.cancelled


@pytest.mark.parametrize("heard", [True, False])
def test_an_interruption_that_nobody_hears_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    monkeypatch.setattr(supervision, "PROGRESS_INTERVAL_S", 0.0)
    order, looks, stuck = make_order(), [], []
    order.enter(Stage.COPYING)
    entered = order.entered

    def clock() -> float:
        looks.append(entered + 3.0 * len(looks))
        if heard and len(looks) == 5:  # the rollback begins, and ends in time
            order.entered = looks[-1]
            order.done.set_result(ExchangeResult("op", "", ""))
        return looks[-1]

    supervised = supervise(
        order, 2.0, 0.0, lambda progress: None, lambda: None, stuck.append, clock
    )
    asyncio.run(supervised)
    with pytest.raises(StageTimedOut, match="COPYING"):
        order.check()
    # It was interrupted at the second look, and had ten seconds from there.
    assert (len(stuck), len(looks)) == ((0, 5) if heard else (1, 6))


# Verifying.


def test_the_sample_is_bounded_and_reaches_both_ends(prose: Model) -> None:
    draw = random.Random(0)
    chosen = sampled_tensors(prose.image.manifest, draw)
    assert chosen
    assert sum(entry.size_bytes for entry in chosen) <= CHECKSUM_BYTES_MAX
    for weights_bytes in (1, 4095, 4096, 10_000, 1 << 20, (1 << 30) + 17):
        pieces = sampled_pieces(weights_bytes, draw)
        assert len(pieces) <= 300
        assert all(start >= 0 and start + count <= weights_bytes for start, count in pieces)
        assert sum(pieces[-1]) == weights_bytes
        gaps = [later - start for (start, _), (later, _) in itertools.pairwise(pieces)]
        assert max(gaps, default=0) <= 2 * max(weights_bytes // 256, PIECE_BYTES)


@pytest.mark.parametrize(
    ("stretch", "least", "most"),
    [(1, 0.008, 0.026), (65_536, 0.2, 0.33), (WEIGHTS // 256, 0.7, 0.86), (WEIGHTS // 128, 1, 1)],
)
def test_what_is_wrong_in_a_large_tensor_is_found_as_often_as_is_said(
    stretch: int, least: float, most: float
) -> None:
    found, draws, start = 0, 1000, WEIGHTS // 3
    for salt in range(draws):
        pieces = sampled_pieces(WEIGHTS, random.Random(salt))
        found += any(at < start + stretch and start < at + count for at, count in pieces)
    assert least <= found / draws <= most


def test_weights_that_differ_in_one_stretch_are_found(prose: Model, pool: PagePool) -> None:
    digest, descriptor = prose.image.digest, os.dup(prose.image.segment.descriptor)
    image = Image.attach(pool.device, descriptor, digest)
    region = Region(pool, "weights", image.manifest.weights_bytes)
    region.grow(region.pages_max)
    transfer = Transfer(pool.device, image.manifest, image.source, region)
    transfer.start()
    transfer.join()
    verify_weights(pool.device, image, region.address, "salt")
    # A stretch that was never written, as after a copy that stopped short.
    zeros = bytes(image.manifest.weights_bytes // 4)
    ctypes.memmove(region.address + image.manifest.weights_bytes // 2, zeros, len(zeros))
    with pytest.raises(CorruptWeights, match="did not arrive whole"):
        verify_weights(pool.device, image, region.address, "salt")
    region.release()
    image.close()


def test_an_attached_image_keeps_no_descriptor_and_must_be_the_one_named(
    prose: Model, pool: PagePool
) -> None:
    before = len(open_descriptors())
    image = Image.attach(pool.device, os.dup(prose.image.segment.descriptor), prose.image.digest)
    assert len(open_descriptors()) == before
    image.close()
    image.close()
    with pytest.raises(CorruptWeights, match="holds image"):
        Image.attach(pool.device, os.dup(prose.image.segment.descriptor), "0" * 64)
    with pytest.raises(CorruptWeights):
        Image.attach(pool.device, os.open("/dev/null", os.O_RDONLY), prose.image.digest)
    assert len(open_descriptors()) == before
