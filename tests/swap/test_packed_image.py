"""Packed images, whole: built from checkpoints, read back, brought to a device behind a gate."""

from __future__ import annotations

import contextlib
import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

import swap.cached_image
import swap.packed_transfer
from swap.arena import PagePool, Region
from swap.checksum import checksum_of
from swap.errors import CorruptWeights, DeviceMisuse, TransferCancelled
from swap.image import (
    FORMAT,
    complete,
    plan_image,
    read_manifest,
    segment_bytes,
)
from swap.image_check import verify_image
from swap.packed_transfer import PackedTransfer
from swap.pieces import device_bytes, place_pieces
from swap.segment import Segment
from swap.store import HostStore
from swap.unpacking import HostUnpacker
from swap.writing import write_all, write_manifest
from tests.swap.packed_images import PIECE, RECIPES, images_in


@pytest.fixture
def build(tmp_path):
    yield from images_in(tmp_path)


@pytest.fixture
def stage(make_device, build):
    """A packed image, the plain one of the same weights, and a transfer ready to start."""
    opened = []

    def prepare(alter=None, **options):
        manifest, segment, _ = build()
        plain, plain_segment, _ = build(packed=False)
        if alter is not None:
            segment = alter(manifest, segment)
        pool = PagePool(make_device(4, **options))
        region = Region(pool, "weights", device_bytes(manifest))
        region.grow(region.pages_max)
        mapping = segment.map()
        opened.append(mapping)
        transfer = PackedTransfer(pool.device, manifest, mapping, region, HostUnpacker())
        expected = os.pread(plain_segment.descriptor, plain.weights_bytes, 0)
        return transfer, manifest, region, expected

    yield prepare
    for mapping in opened:
        mapping.close()


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr(swap.packed_transfer, "PACKED_COPY_BYTES_MAX", 4096)


def tensors_at(address, manifest):
    return {
        entry.name: ctypes.string_at(address + entry.offset_bytes, entry.size_bytes)
        for entry in manifest.tensors
    }


def test_a_packed_image_is_smaller_and_holds_the_same_weights(build):
    manifest, segment, layout = build()
    plain, plain_segment, _ = build(packed=False)
    assert manifest.packed
    assert manifest.format == plain.format == FORMAT
    assert not plain.packed
    assert b"piece" not in msgspec.json.encode(plain)
    assert b"stored" not in msgspec.json.encode(plain)
    assert segment.size_bytes == segment_bytes(manifest) == os.fstat(segment.descriptor).st_size
    assert segment.size_bytes < 0.85 * plain_segment.size_bytes < segment_bytes(layout)
    assert segment.sealed
    assert read_manifest(segment.descriptor) == manifest
    assert manifest.weights_bytes == plain.weights_bytes
    assert manifest.layers == plain.layers
    assert [entry.checksum for entry in manifest.tensors] == [
        entry.checksum for entry in plain.tensors
    ]
    assert manifest.digest != plain.digest
    verify_image(segment.descriptor, manifest)
    by_name = {entry.name: entry for entry in manifest.tensors}
    assert len(by_name["embedding"].pieces) == 6
    assert by_name["nothing"].pieces == ()
    assert by_name["norm"].pieces == (66,)  # too small to be packed
    assert all(size == PIECE * 2 for size in by_name["noise"].pieces[:-1])
    assert build()[0] == manifest


def test_the_store_counts_what_a_packed_image_takes(build):
    manifest, segment, layout = build()
    store = HostStore(segment_bytes(layout))
    reservation = store.reserve(segment_bytes(layout))
    assert store.commit(reservation, Segment(os.dup(segment.descriptor))) == manifest
    assert store.used_bytes == segment_bytes(manifest) < segment_bytes(layout)
    store.close()


def test_only_bfloat16_is_packed():
    for dtype, piece in (("float32", PIECE), ("bfloat16", 5), ("bfloat16", 1 << 40)):
        with pytest.raises(ValueError, match="cannot be packed"):
            plan_image(RECIPES, dtype, {}, piece_weights=piece)


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_weights_arrive_in_parts(stage, small_copies, cancelled):
    first, manifest, region, expected = stage()
    device, mapping, stored = region.pool.device, first._mapping, 0
    there = 0
    for room_bytes in (manifest.weights_bytes // 3, manifest.weights_bytes // 3 * 2, None):
        transfer = PackedTransfer(
            device,
            manifest,
            mapping,
            region,
            HostUnpacker(),
            there_bytes=there,
            room_bytes=room_bytes,
        )
        before = [span.offset_bytes + span.bytes <= there for span in manifest.layers]
        assert transfer.gate.landed_layers >= sum(before) - 1
        if cancelled and room_bytes is not None:
            transfer.cancel()
        transfer.start()
        with contextlib.suppress(TransferCancelled):
            transfer.join()
        assert transfer.landed_bytes >= there
        there = transfer.landed_bytes
        stored += transfer.bytes_total
        assert transfer.complete == (room_bytes is None)
        found = ctypes.string_at(region.address, there)
        for entry in manifest.tensors:
            end = min(entry.offset_bytes + entry.size_bytes, there)
            assert found[entry.offset_bytes : end] == expected[entry.offset_bytes : end]
    assert there == manifest.weights_bytes
    assert cancelled or stored == manifest.stored_bytes


def test_the_weights_arrive_unpacked_layer_by_layer(stage, small_copies):
    transfer, manifest, region, expected = stage()
    transfer.start()
    for span in manifest.layers:
        transfer.gate.wait(span.layer, 120)
        for entry in manifest.tensors:
            if entry.layer == span.layer:
                landed = ctypes.string_at(region.address + entry.offset_bytes, entry.size_bytes)
                assert landed == expected[entry.offset_bytes :][: entry.size_bytes]
    transfer.join()
    assert transfer.complete
    assert transfer.bytes_done == transfer.bytes_total == manifest.stored_bytes
    for name, data in tensors_at(region.address, manifest).items():
        entry = next(one for one in manifest.tensors if one.name == name)
        assert checksum_of(data) == entry.checksum


def test_a_throttled_link_carries_only_what_is_stored(stage, stepped_clock):
    clock = stepped_clock()
    transfer, manifest, _, expected = stage(link_bytes_per_s=1e6, clock=clock)
    transfer.start()
    transfer.join()
    assert clock.now == pytest.approx(manifest.stored_bytes / 1e6)
    assert clock.now < 0.85 * len(expected) / 1e6


def test_a_cancelled_transfer_leaves_nothing_running(stage, small_copies, stepped_clock):
    clock = stepped_clock(blocking=True)
    transfer, manifest, region, _ = stage(link_bytes_per_s=1.0, clock=clock)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(transfer.gate.wait, manifest.layers[-1].layer, 120)
        transfer.start()
        assert clock.asleep.acquire(timeout=120)
        transfer.cancel()
        clock.step(1 + region.pool.device.copies_ahead)
        with pytest.raises(TransferCancelled):
            transfer.join()
        with pytest.raises(TransferCancelled):
            waiting.result(120)
    assert not transfer.complete
    region.release()


def test_weights_that_have_arrived_but_are_not_unpacked_never_land(stage):
    transfer, manifest, _, _ = stage()

    def reached(place, cancelled):
        if place == "unpacking":  # one copy call has brought every byte by now
            transfer.cancel()

    transfer._reached = reached
    transfer.start()
    with pytest.raises(TransferCancelled):
        transfer.join()
    assert transfer.bytes_done == transfer.bytes_total
    assert not transfer.complete
    with pytest.raises(TransferCancelled):
        transfer.gate.wait(len(manifest.layers) - 2, timeout_s=10)


def altered_at(place_in_piece, value):
    """A copy of a segment with one byte of its first packed piece changed, sealed again."""

    def alter(manifest, segment):
        content = bytearray(os.pread(segment.descriptor, segment.size_bytes, 0))
        piece = next(one for one in place_pieces(manifest) if one.packed)
        content[piece.stored_offset_bytes + place_in_piece] = value
        copy = Segment.create(segment.size_bytes, "altered")
        write_all(copy.descriptor, bytes(content), 0)
        copy.seal()
        return copy

    return alter


@pytest.mark.parametrize(("place", "value"), [(0, 0), (4, 9), (9, 0xFF), (64, 0xFF), (70, 0xFF)])
def test_a_damaged_piece_ends_the_transfer_as_corrupt(stage, place, value):
    transfer, manifest, region, _ = stage(alter=altered_at(place, value))
    transfer.start()
    with pytest.raises(CorruptWeights, match="packed weights is damaged"):
        transfer.join()
    with pytest.raises(CorruptWeights):
        transfer.gate.wait(manifest.layers[-1].layer, 120)
    region.release()


def test_verification_finds_altered_packed_bytes(build):
    manifest, segment, _ = build()
    copy = altered_at(8192, 0x55)(manifest, segment)
    assert read_manifest(copy.descriptor) == manifest  # weights are not read for it
    with pytest.raises(CorruptWeights, match="tensor embedding"):
        verify_image(copy.descriptor, manifest)
    verify_image(copy.descriptor, manifest, ["a", "noise"])
    copy.close()


def test_copying_waits_for_pages_that_come_later(make_device, build):
    manifest, segment, _ = build()
    pool = PagePool(make_device(4))
    region = Region(pool, "weights", device_bytes(manifest))
    with segment.map() as mapping:
        transfer = PackedTransfer(
            pool.device, manifest, mapping, region, HostUnpacker(), growing=True
        )
        transfer.start()
        while region.mapped_pages < region.pages_max:
            assert not transfer.complete
            region.grow(1)
            transfer.backed(region.mapped_bytes)
        transfer.join()
        for name, data in tensors_at(region.address, manifest).items():
            entry = next(one for one in manifest.tensors if one.name == name)
            assert checksum_of(data) == entry.checksum


def test_a_region_without_room_to_unpack_is_refused(stage):
    transfer, manifest, region, _ = stage()
    region.shrink(1)
    source = transfer._mapping
    with pytest.raises(DeviceMisuse, match="needs"):
        PackedTransfer(region.pool.device, manifest, source, region, HostUnpacker())


def test_a_manifest_whose_pieces_lie_is_refused(build):
    manifest, segment, _ = build()
    replace = msgspec.structs.replace
    first, *rest = manifest.tensors
    lies = [
        {"tensors": (replace(first, pieces=first.pieces[1:]), *rest)},
        {"tensors": (replace(first, pieces=(*first.pieces[:-1], 0)), *rest)},
        {"tensors": (replace(first, pieces=(*first.pieces[:-1], PIECE * 2 + 1)), *rest)},
        {"tensors": (replace(first, dtype="float16"), *rest)},
        {"piece_weights": PIECE + 1},
        {"piece_weights": 1 << 40},
        {"piece_weights": 0},
        {"format": 1},
    ]
    for lie in lies:
        bare = replace(manifest, **lie)
        signed = complete(bare, {entry.name: entry.checksum for entry in bare.tensors})
        descriptor = os.memfd_create("lie")
        os.ftruncate(descriptor, segment.size_bytes + (1 << 20))
        write_manifest(descriptor, signed)
        with pytest.raises(CorruptWeights, match="inconsistent"):
            read_manifest(descriptor)
        os.close(descriptor)
