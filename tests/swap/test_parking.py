"""The parking area: a budget in pieces of any size, and rows that are gathered and spread again."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading

import pytest

from swap.arena import PagePool, Region
from swap.errors import DeviceMisuse, TransferCancelled
from swap.parking import ParkingArea
from swap.transfer import Transfer
from swap.virtual_memory import view_of

KIB = 1 << 10
PAGE = 2 << 20


def test_pieces_are_taken_within_the_budget_or_not_at_all() -> None:
    area = ParkingArea(100 * KIB)
    first = area.take(3, 30 * KIB)
    assert first is not None
    assert len(set(first)) == 3
    assert area.used_bytes == 90 * KIB
    assert area.take(2, 10 * KIB) is None
    assert area.used_bytes == 90 * KIB
    # What two holes hold together is of use, as pieces need not lie together.
    area.give_back((first[0], first[2]), 30 * KIB)
    assert area.take(7, 10 * KIB) is not None
    assert area.take(1, KIB) is None
    assert area.used_bytes == 100 * KIB


def test_any_order_of_taking_and_giving_back_ends_with_the_whole_budget() -> None:
    draw, area = random.Random(3), ParkingArea(PAGE)
    taken: list[tuple[tuple[int, ...], int]] = []
    for _ in range(500):
        if taken and draw.random() < 0.5:
            area.give_back(*taken.pop(draw.randrange(len(taken))))
        else:
            size = draw.choice([KIB, 7 * KIB, 64 * KIB])
            pieces = area.take(draw.randint(1, 20), size)
            if pieces is not None:
                taken.append((pieces, size))
        ranges = sorted((piece, piece + size) for pieces, size in taken for piece in pieces)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert area.used_bytes == sum(end - start for start, end in ranges) <= area.limit_bytes
    with pytest.raises(ValueError, match="still parked"):
        area.close()
    for each in taken:
        area.give_back(*each)
    assert area.take(1, PAGE) is not None


def test_what_cannot_be_parked_is_said() -> None:
    assert ParkingArea(0).take(1, KIB) is None
    with pytest.raises(ValueError, match="-1 bytes"):
        ParkingArea(-1)
    area = ParkingArea(4 * KIB)
    pieces = area.take(2, KIB)
    assert pieces is not None
    area.give_back(pieces, KIB)
    with pytest.raises(ValueError, match="twice"):
        area.give_back(pieces[:1], KIB)
    ParkingArea(KIB).close()


@pytest.mark.parametrize("row_bytes", [64, 60, 7])
def test_rows_are_gathered_and_spread(make_device, row_bytes: int) -> None:
    device = make_device(2)
    base = device.reserve(2 * PAGE)
    device.map(base, (0, 1))
    whole = view_of(base, 2 * PAGE)
    whole[:1000] = bytes(place % 251 for place in range(1000))
    buffer = ctypes.create_string_buffer(5 * row_bytes)
    address = ctypes.addressof(buffer)
    device.wait(device.copy_out_rows(address, base + 3, row_bytes, 5, 180))
    rows = [bytes(whole[3 + 180 * row : 3 + 180 * row + row_bytes]) for row in range(5)]
    assert buffer.raw == b"".join(rows)
    into = base + PAGE
    whole[PAGE : PAGE + 5 * 180] = b"\xff" * 5 * 180
    device.wait(device.copy_in_rows(into, address, row_bytes, 5, 180))
    for row in range(5):
        start = PAGE + row * 180
        assert bytes(whole[start : start + row_bytes]) == rows[row]
        assert bytes(whole[start + row_bytes : start + 180]) == b"\xff" * (180 - row_bytes)
    with pytest.raises(DeviceMisuse, match="rows of"):
        device.copy_out_rows(address, base, 64, 5, 63)
    device.unmap(base, 2)
    with pytest.raises(DeviceMisuse, match="unmapped"):
        device.copy_out_rows(address, base, row_bytes, 5, 180)


def test_pages_are_not_unmapped_while_they_are_copied_out(make_device, stepped_clock) -> None:
    clock = stepped_clock(blocking=True)
    device = make_device(1, link_bytes_per_s=1.0, clock=clock)
    base = device.reserve(PAGE)
    device.map(base, (0,))
    buffer = ctypes.create_string_buffer(64)
    arguments = (ctypes.addressof(buffer), base, 8, 8, 16)
    thread = threading.Thread(target=lambda: device.wait(device.copy_out_rows(*arguments)))
    thread.start()
    assert clock.asleep.acquire(timeout=120)
    with pytest.raises(DeviceMisuse, match="running"):
        device.unmap(base, 1)
    clock.step()
    thread.join(120)
    assert device.unmap(base, 1) == (0,)


def test_a_transfer_waits_for_pages_that_are_still_to_come(make_device, make_image) -> None:
    manifest, segment = make_image()
    pool = PagePool(make_device(4))
    with segment.map() as mapping:
        region = Region(pool, "weights", manifest.weights_bytes)
        with pytest.raises(DeviceMisuse):
            Transfer(pool.device, manifest, mapping, region)
        transfer = Transfer(pool.device, manifest, mapping, region, growing=True)
        transfer.start()
        region.grow(region.pages_max)
        transfer.backed(region.mapped_bytes)
        transfer.join()
        assert transfer.complete
        arrived = bytes(view_of(region.address, manifest.weights_bytes))
        assert arrived == bytes(mapping.view(0, manifest.weights_bytes))
        region.shrink(region.mapped_pages)
        waiting = Transfer(pool.device, manifest, mapping, region, growing=True)
        waiting.start()
        waiting.cancel()
        with pytest.raises(TransferCancelled):
            waiting.join()
        region.release()
