"""Copying layer by layer: what has landed is there, and whoever waits is woken."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swap.arena import PagePool, Region
from swap.errors import (
    DeviceError,
    DeviceMisuse,
    InsufficientDeviceMemory,
    TransferCancelled,
    TransferFailed,
)
from swap.shared_link import OwnTurn, SharedLink
from swap.transfer import Transfer, measure_link
from swap.virtual_memory import view_of
from tests.support.descriptors import open_descriptors

PAGE = 2 << 20


@pytest.fixture
def small_copies(monkeypatch):
    """One copy call per 4096 bytes, so that images of a few layers take several."""
    monkeypatch.setattr(Transfer, "copy_bytes_max", 4096)


@pytest.fixture
def stage(make_device, make_image):
    """A transfer ready to start, over a device with the options given."""
    opened = []

    def prepare(transfer=None, **options):
        manifest, segment = make_image()
        pool = PagePool(make_device(4, **options))
        region = Region(pool, "weights", manifest.weights_bytes)
        region.grow(region.pages_max)
        mapping = segment.map()
        opened.append(mapping)
        made = Transfer(pool.device, manifest, mapping, region, **transfer or {})
        return made, manifest, mapping, region

    yield prepare
    for mapping in opened:
        mapping.close()


def test_the_image_arrives_whole(stage, small_copies):
    transfer, manifest, mapping, region = stage()
    assert not transfer.complete
    transfer.start()
    for span in manifest.layers:
        transfer.gate.wait(span.layer, 120)
        landed = bytes(view_of(region.address + span.offset_bytes, span.bytes))
        assert landed == bytes(mapping.view(span.offset_bytes, span.bytes))
    transfer.join()
    assert transfer.complete
    assert transfer.bytes_done == transfer.bytes_total == manifest.weights_bytes
    assert transfer.seconds > 0
    transfer.gate.wait(99)


def test_layers_land_one_by_one_in_order(stage, small_copies, stepped_clock):
    clock = stepped_clock(blocking=True)
    transfer, manifest, _, region = stage(link_bytes_per_s=1.0, clock=clock)
    transfer.start()
    reached = []
    copies = manifest.weights_bytes // 4096
    for copy in range(1, copies + 1):
        assert clock.asleep.acquire(timeout=120)
        reached.append((transfer.bytes_done, transfer.gate.landed_layers))
        if copy == 1:
            with pytest.raises(TimeoutError, match="layer -1"):
                transfer.gate.wait(-1, 0.0)
        clock.step()
    transfer.join()
    ends = [span.offset_bytes + span.bytes for span in manifest.layers]
    expected = [(done * 4096, sum(end <= done * 4096 for end in ends)) for done in range(copies)]
    if region.pool.device.copies_ahead:
        # The transfer's thread may be late to notice a copy's end, and is never early.
        assert all(
            bytes_done <= done and landed <= layers
            for (bytes_done, landed), (done, layers) in zip(reached, expected, strict=True)
        )
    else:
        assert reached == expected
    assert transfer.gate.landed_layers == len(manifest.layers)


def test_waiting_threads_are_woken_by_their_layer(stage, small_copies):
    transfer, manifest, _, _ = stage()
    layers = [span.layer for span in manifest.layers] * 4
    with ThreadPoolExecutor(len(layers)) as threads:
        waiting = [threads.submit(transfer.gate.wait, layer, 120) for layer in layers]
        transfer.start()
        assert [future.result(120) for future in waiting] == [None] * len(layers)
    transfer.join()


def test_a_cancelled_transfer_stops_and_says_how_far_it_came(stage, small_copies, stepped_clock):
    clock = stepped_clock(blocking=True)
    transfer, manifest, _, region = stage(link_bytes_per_s=1.0, clock=clock)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(transfer.gate.wait, manifest.layers[-1].layer, 120)
        transfer.start()
        assert clock.asleep.acquire(timeout=120)
        transfer.cancel()
        ahead = region.pool.device.copies_ahead
        clock.step(1 + ahead)
        with pytest.raises(TransferCancelled) as cancelled:
            transfer.join()
        with pytest.raises(TransferCancelled):
            waiting.result(120)
    assert cancelled.value.metadata["bytes_total"] == str(manifest.weights_bytes)
    assert cancelled.value.metadata["bytes_done"] in (("0", "4096") if ahead else ("4096",))
    assert not transfer.complete
    region.release()  # nothing is being copied any more


def test_cancelling_what_has_ended_changes_nothing(stage):
    transfer, *_ = stage()
    transfer.start()
    transfer.join()
    transfer.cancel()
    transfer.join()
    assert transfer.complete


@pytest.mark.parametrize("broken", ["copy_in", "wait"])
def test_a_failure_wakes_everybody(stage, small_copies, monkeypatch, broken):
    transfer, manifest, _, region = stage()
    device, calls = region.pool.device, []
    real = getattr(device, broken)
    good_calls = 4 + (device.copies_ahead if broken == "copy_in" else 0)

    def fail_later(*arguments):
        calls.append(arguments)
        if len(calls) == good_calls + 1:  # once: what was issued is still waited for
            raise DeviceError("the link is down")
        return real(*arguments)

    monkeypatch.setattr(device, broken, fail_later)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(transfer.gate.wait, manifest.layers[-1].layer, 120)
        transfer.start()
        with pytest.raises(TransferFailed, match="the link is down") as failed:
            transfer.join()
        with pytest.raises(TransferFailed):
            waiting.result(120)
    assert isinstance(failed.value.__cause__, DeviceError)
    assert failed.value.metadata["bytes_done"] == str(4 * 4096)
    transfer.gate.wait(manifest.layers[0].layer)  # what had landed before stays landed


def test_a_region_or_source_that_is_too_small_is_refused(stage):
    transfer, manifest, mapping, region = stage()
    region.shrink(1)
    with pytest.raises(DeviceMisuse, match="0 bytes mapped"):
        Transfer(region.pool.device, manifest, mapping, region)
    assert not transfer.complete


@pytest.mark.parametrize("outward", [False, True])
def test_measuring_the_link_leaves_nothing_behind(make_device, outward):
    device = make_device(4)
    pool = PagePool(device)
    descriptors = len(open_descriptors())
    images = Path("/proc/self/maps").read_text().count("hotbay-image")
    assert measure_link(pool, 3 * PAGE - 5, outward=outward) > 1e6
    assert device.statistics().copied_bytes == 6 * (3 * PAGE - 5)
    # With less room than asked for, it measures with what there is.
    held = pool.take("model", 3)
    assert measure_link(pool, 64 * PAGE, outward=outward) > 1e6
    pool.give_back("model", held)
    pool.take("model", 4)
    with pytest.raises(InsufficientDeviceMemory):
        measure_link(pool, PAGE, outward=outward)
    statistics = device.statistics()
    assert (statistics.pages_mapped, statistics.reservations) == (0, 0)
    assert pool.owners() == {"model": 4}
    assert len(open_descriptors()) == descriptors
    assert Path("/proc/self/maps").read_text().count("hotbay-image") == images


@pytest.mark.parametrize("outward", [False, True])
def test_measuring_a_throttled_link_finds_the_throttle(make_device, outward):
    rate = 400e6
    pool = PagePool(make_device(8, link_bytes_per_s=rate))
    found = measure_link(pool, 8 * PAGE, outward=outward)
    assert rate * 0.7 < found < rate * 1.05


def test_a_swap_reuses_addresses_and_never_copies_what_it_evicts(make_device, make_image):
    """Two models take turns on a device that holds one; both engines keep their addresses."""
    manifests = [make_image(seed, elements=(500_000, 200_000, 300_000)) for seed in (1, 2)]
    pages = -(-manifests[0][0].weights_bytes // PAGE)
    device = make_device(pages)
    pool = PagePool(device)
    regions = [Region(pool, f"engine {index}", pages * PAGE) for index in range(2)]
    addresses = [region.address for region in regions]
    for turn in range(10):
        incoming, outgoing = regions[turn % 2], regions[1 - turn % 2]
        manifest, segment = manifests[turn % 2]
        outgoing.shrink(outgoing.mapped_pages)
        incoming.grow(pages)
        with segment.map() as mapping:
            transfer = Transfer(device, manifest, mapping, incoming)
            transfer.start()
            transfer.join()
            expected = bytes(mapping.view(0, manifest.weights_bytes))
        assert ctypes.string_at(incoming.address, manifest.weights_bytes) == expected
        assert device.statistics().copied_bytes == (turn + 1) * manifest.weights_bytes
        if turn == 0:
            threads = threading.active_count()  # those that a device keeps are there by now
    assert [region.address for region in regions] == addresses
    assert threading.active_count() <= threads


@pytest.fixture
def link(tmp_path):
    return SharedLink(tmp_path / "link")


def take(turn, given_up=None):
    turn.take(given_up or threading.Event())
    return turn


def in_use(link):
    turn = take(SharedLink(link.path, swap_wait_s=0.0).turn())
    turn.end()
    return turn.missed


def test_a_transfer_waits_for_its_turn_and_says_when_it_has_begun(stage, link, small_copies):
    other = take(link.turn())
    begun = threading.Event()
    transfer, manifest, _, _ = stage(transfer={"turn": link.turn(), "under_way": begun.set})
    transfer.start()
    assert not begun.wait(0.05)
    assert transfer.turn.waiting
    assert transfer.bytes_done == 0
    other.end()
    assert begun.wait(120)
    transfer.join()
    assert transfer.bytes_done == manifest.weights_bytes
    assert transfer.turn.waited_s >= 0.05
    assert not in_use(link), "the link is free again"


class AnHourLate(OwnTurn):
    """A turn that says that it was waited for."""

    waited_s = 3600.0


def test_waiting_for_the_link_is_not_copying(stage):
    transfer, *_ = stage(transfer={"turn": AnHourLate(whole=True)})
    transfer.start()
    transfer.join()
    assert -3600 < transfer.seconds < 0, "the hour is taken off, which nobody has waited here"


def test_a_transfer_that_waits_for_the_link_can_be_cancelled(stage, link):
    other = take(link.turn())
    transfer, _, _, _ = stage(transfer={"turn": link.turn()})
    transfer.start()
    while not transfer.turn.number:
        pass
    transfer.cancel()
    with pytest.raises(TransferCancelled, match="after 0 of"):
        transfer.join()
    with pytest.raises(TransferCancelled):
        transfer.gate.wait(-1, 120)
    other.end()
    assert not in_use(link)


def test_a_swap_goes_between_the_pieces_of_a_background_copy(
    stage, link, small_copies, stepped_clock
):
    clock = stepped_clock(blocking=True)
    turn = link.turn(background=True)
    transfer, manifest, _, _ = stage(link_bytes_per_s=1.0, clock=clock, transfer={"turn": turn})
    transfer.start()
    assert clock.asleep.acquire(timeout=120)
    swap = link.turn()
    waiting = threading.Thread(target=take, args=(swap,), daemon=True)
    waiting.start()
    while not swap.number:
        pass
    # The one piece under way ends, and the swap has its turn before the next.
    clock.step()
    waiting.join(120)
    assert not waiting.is_alive()
    assert not clock.asleep.acquire(timeout=0.05)
    assert transfer.bytes_done == 4096
    swap.end()
    clock.step(manifest.weights_bytes // 4096)
    transfer.join()
    assert transfer.complete
    assert turn.waited_s >= 0.05


def test_a_swap_keeps_the_link_for_its_whole_copy(stage, link, small_copies, stepped_clock):
    clock = stepped_clock(blocking=True)
    transfer, manifest, _, _ = stage(
        link_bytes_per_s=1.0, clock=clock, transfer={"turn": link.turn()}
    )
    transfer.start()
    for _ in range(-(-manifest.weights_bytes // 4096)):
        assert clock.asleep.acquire(timeout=120)
        assert in_use(link)
        clock.step()
    transfer.join()
    assert not in_use(link)


@pytest.mark.parametrize("outward", [False, True])
def test_measuring_waits_for_turns_like_a_background_copy(make_device, link, outward):
    pool = PagePool(make_device(2))
    other = take(link.turn())
    found = []
    measuring = threading.Thread(
        target=lambda: found.append(measure_link(pool, PAGE, link, outward=outward)), daemon=True
    )
    measuring.start()
    measuring.join(0.05)
    assert measuring.is_alive()
    other.end()
    measuring.join(120)
    assert found[0] > 0
    assert pool.free_pages == 2
