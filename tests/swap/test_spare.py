"""Spare memory: present before it is wanted, never more than allowed, and never given twice."""

from __future__ import annotations

import os
import random
import threading

import pytest

import swap.spare
from swap.errors import BuildCancelled, InsufficientHostMemory
from swap.presence import make_present
from swap.segment import Segment
from swap.spare import SpareMemory, Want, wanted_segments

MIB = 1 << 20


def present_bytes(segment: Segment) -> int:
    return os.fstat(segment.descriptor).st_blocks * 512


@pytest.fixture(autouse=True)
def small_segments_are_worth_it(monkeypatch):
    monkeypatch.setattr(swap.spare, "SPARE_BYTES_MIN", MIB)


@pytest.fixture
def memory():
    memory = SpareMemory()
    yield memory
    memory.close()


def stock(memory, *sizes, node=-1):
    """Spare segments, touched all over and ready to be given."""
    for size in sizes:
        spare = memory.add(Segment.create(size, "spare"), node)
        make_present(spare.segment, threads=2, huge_pages=True, cancelled=threading.Event())
        spare.touched = False


# What is wanted.


def test_the_largest_missing_images_are_prepared_for_as_many_as_load_at_once():
    sizes = [5 * MIB, 90 * MIB, 40 * MIB]
    assert wanted_segments(sizes, (), 2, 1 << 40) == (Want(90 * MIB), Want(40 * MIB))
    assert wanted_segments(sizes, (0, 1), 3, 1 << 40) == (
        Want(90 * MIB, 0),
        Want(40 * MIB, 1),
        Want(5 * MIB, 0),
    )
    assert wanted_segments([], (0,), 2, 1 << 40) == ()


def test_the_limit_is_kept_and_crumbs_are_not_worth_it():
    sizes = [90 * MIB, 40 * MIB]
    assert wanted_segments(sizes, (), 2, 100 * MIB) == (Want(90 * MIB), Want(10 * MIB))
    assert wanted_segments(sizes, (), 2, 50 * MIB) == (Want(50 * MIB),)
    assert wanted_segments(sizes, (), 2, MIB - 1) == ()
    assert wanted_segments([MIB - 1], (), 2, 1 << 40) == ()
    assert wanted_segments(sizes, (), 2, 0) == ()


# Taking.


def test_a_segment_is_given_present_and_of_the_size_that_was_asked_for(memory):
    stock(memory, 4 * MIB, 9 * MIB)
    assert memory.bytes == 13 * MIB
    with memory.take(3 * MIB + 4096) as segment:
        assert segment.size_bytes == 3 * MIB + 4096 == os.fstat(segment.descriptor).st_size
        assert present_bytes(segment) == segment.size_bytes
        assert not segment.sealed
        assert memory.bytes == 9 * MIB
        assert os.pread(segment.descriptor, 4096, 0) == bytes(4096)
        with memory.take(8 * MIB) as other:
            assert other.descriptor != segment.descriptor
    assert memory.bytes == 0
    assert memory.take(4096) is None


def test_too_small_a_segment_is_better_than_none(memory):
    stock(memory, 2 * MIB, 4 * MIB)
    with memory.take(6 * MIB) as segment:
        assert segment.size_bytes == 6 * MIB
        assert present_bytes(segment) == 4 * MIB
        assert os.pread(segment.descriptor, MIB, 5 * MIB) == bytes(MIB)
    assert memory.bytes == 2 * MIB


def test_memory_of_another_node_is_not_given(memory):
    stock(memory, 2 * MIB, node=0)
    assert memory.take(MIB, 1) is None
    memory.take(MIB, 0).close()
    stock(memory, 2 * MIB, node=0)
    memory.take(MIB).close()


def test_what_somebody_still_touches_is_not_given(memory):
    spare = memory.add(Segment.create(2 * MIB, "spare"), -1)
    assert memory.take(MIB) is None
    spare.touched = False
    memory.take(MIB).close()


# Keeping to what is wanted, and to the budget.


def test_what_is_wanted_stays_and_the_rest_goes(memory):
    stock(memory, 2 * MIB, 5 * MIB, 9 * MIB)
    missing = memory.settle((Want(8 * MIB), Want(4 * MIB), Want(6 * MIB)))
    assert missing == (Want(6 * MIB),)
    assert memory.bytes == 14 * MIB
    assert memory.settle((Want(8 * MIB, numa_node=1),)) == (Want(8 * MIB, numa_node=1),)
    assert memory.bytes == 0


@pytest.mark.parametrize("limit", [14 * MIB, 13 * MIB, 9 * MIB, 8 * MIB, MIB, MIB - 1, 0])
def test_a_budget_that_shrinks_frees_memory_at_once_even_if_others_hold_it(memory, limit):
    stock(memory, 5 * MIB, 9 * MIB)
    held = [os.dup(spare.segment.descriptor) for spare in memory._spares]
    memory.shrink(limit)
    assert memory.bytes <= limit
    assert memory.bytes > limit - MIB or limit < MIB
    assert sum(os.fstat(each).st_blocks * 512 for each in held) <= limit
    for each in held:
        os.close(each)


def test_any_sequence_keeps_its_account(memory):
    draw, given = random.Random(5), []
    for _ in range(300):
        step = draw.randrange(4)
        if step == 0 and len(memory._spares) < 6:
            spare = memory.add(Segment.create(draw.randint(1, 12) * MIB, "s"), draw.choice((0, 1)))
            spare.touched = draw.random() < 0.3
        elif step == 1:
            size = draw.randint(1, 12) * MIB
            if (segment := memory.take(size, draw.choice((-1, 0, 1)))) is not None:
                assert segment.size_bytes == size
                given.append(segment)
        elif step == 2:
            limit = draw.randint(0, 40) * MIB
            memory.shrink(limit)
            assert memory.bytes <= limit
        else:
            sizes = [draw.randint(1, 12) * MIB for _ in range(3)]
            memory.settle(wanted_segments(sizes, (0, 1), 2, 20 * MIB))
        descriptors = [spare.segment.descriptor for spare in memory._spares]
        assert len({*descriptors, *(each.descriptor for each in given)}) == (
            len(descriptors) + len(given)
        )
        assert memory.bytes == sum(os.fstat(each).st_size for each in descriptors)
    for segment in given:
        segment.close()


# Touching.


@pytest.mark.parametrize("threads", [1, 4, 100])
def test_touching_makes_all_of_it_present_and_changes_nothing(threads):
    with Segment.create(37 * MIB + 4096, "touched") as segment:
        os.pwrite(segment.descriptor, b"here", 20 * MIB)
        make_present(segment, threads=threads, huge_pages=True, cancelled=threading.Event())
        assert present_bytes(segment) >= segment.size_bytes
        assert os.pread(segment.descriptor, 4, 20 * MIB) == b"here"


def test_touching_stops_when_told_and_when_the_segment_is_cut():
    stop = threading.Event()
    stop.set()
    with Segment.create(8 * MIB, "touched") as segment:
        with pytest.raises(BuildCancelled):
            make_present(segment, threads=2, huge_pages=True, cancelled=stop)
        assert present_bytes(segment) == 0
        os.ftruncate(segment.descriptor, 0)  # as its owner does who needs the memory
        with pytest.raises(InsufficientHostMemory, match="made present"):
            make_present(segment, threads=2, huge_pages=True, cancelled=threading.Event())


def test_a_sealed_segment_is_left_alone():
    with Segment.create(MIB, "sealed") as segment:
        segment.seal()
        with pytest.raises(ValueError, match="sealed"):
            make_present(segment, threads=1, huge_pages=True, cancelled=threading.Event())
