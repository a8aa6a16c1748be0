"""Pages of segments: chosen by what the host has, and an image in huge ones is an image."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from swap.build import build_image
from swap.cached_image import restore_image, save_image
from swap.checkpoint import Checkpoint
from swap.errors import DeviceError
from swap.huge_pages import (
    SMALL_PAGE_BYTES,
    describe,
    free_bytes,
    largest_bytes,
    page_bytes_for,
    transparent_rule,
)
from swap.image import TensorRecipe, plan_image, read_manifest, segment_bytes
from swap.image_check import verify_image
from swap.presence import make_present
from swap.segment import Segment
from swap.spare import make_segment
from swap.writing import write_all

MIB, GIB = 1 << 20, 1 << 30
HUGE_BYTES = 2 * MIB
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
PAGES = 16


def pools(directory: Path, **free: int) -> Path:
    for name, count in free.items():
        pool = directory / f"hugepages-{name.removeprefix('k')}kB"
        pool.mkdir()
        (pool / "free_hugepages").write_text(f"{count}\n")
        (pool / "nr_hugepages").write_text(f"{count}\n")
        (pool / "resv_hugepages").write_text("1\n")
    return directory


def test_the_largest_pages_without_much_loss_are_chosen(tmp_path):
    both = pools(tmp_path, k2048=100, k1048576=5)  # one of each is promised to others
    assert free_bytes(HUGE_BYTES, both) == 99 * HUGE_BYTES
    assert page_bytes_for(4 * GIB - 5, "auto", both) == GIB
    assert page_bytes_for(3 * GIB + 1, "auto", both) == SMALL_PAGE_BYTES  # loses much, or lacks
    assert page_bytes_for(5 * GIB, "auto", both) == SMALL_PAGE_BYTES
    assert page_bytes_for(99 * HUGE_BYTES, "auto", both) == HUGE_BYTES
    assert page_bytes_for(99 * HUGE_BYTES + 1, "auto", both) == SMALL_PAGE_BYTES
    assert page_bytes_for(MIB, "auto", both) == SMALL_PAGE_BYTES
    assert largest_bytes(4 * GIB - 5, "auto", both) == 4 * GIB
    assert largest_bytes(500 * HUGE_BYTES - 5, "auto", both) == GIB  # if the pools were filled
    assert largest_bytes(50 * HUGE_BYTES - 5, "auto", both) == 50 * HUGE_BYTES
    for setting in ("transparent", "off"):
        assert largest_bytes(4 * GIB - 5, setting, both) == 4 * GIB - 5
        assert page_bytes_for(4 * GIB, setting, both) == SMALL_PAGE_BYTES


def test_a_host_without_pools_or_rules_has_small_pages(tmp_path):
    assert free_bytes(HUGE_BYTES, tmp_path) == 0
    assert page_bytes_for(GIB, "auto", tmp_path) == SMALL_PAGE_BYTES
    assert transparent_rule(tmp_path / "none") == ""
    assert describe("auto", tmp_path, tmp_path / "none") == "4 KiB pages"
    (tmp_path / "hugepages-2048kB").mkdir()
    (tmp_path / "hugepages-2048kB" / "free_hugepages").write_text("many")
    assert free_bytes(HUGE_BYTES, tmp_path) == 0


def test_what_segments_are_made_of_is_told(tmp_path):
    rule = tmp_path / "shmem_enabled"
    rule.write_text("always within_size [advise] never deny force\n")
    host = pools(tmp_path, k2048=3)
    assert transparent_rule(rule) == "advise"
    assert describe("auto", host, rule) == (
        "2 free huge pages of 2 MiB, then transparent huge pages, then 4 KiB pages"
    )
    assert describe("transparent", host, rule) == "transparent huge pages, then 4 KiB pages"
    rule.write_text("always [never]\n")
    assert describe("transparent", host, rule) == describe("off", host, rule) == "4 KiB pages"


@pytest.fixture
def pool():
    """A few huge pages of the host's, for the length of a test."""
    try:
        before = POOL.read_text()
        POOL.write_text(str(int(before) + PAGES))
    except OSError:
        pytest.skip("huge pages can be had by root alone, on a host that has them")
    try:
        if free_bytes(HUGE_BYTES) < PAGES * HUGE_BYTES:
            pytest.skip("the host's memory is too fragmented for huge pages")
        yield
    finally:
        POOL.write_text(before)


RECIPES = [
    TensorRecipe("embed", -1, ("embed",), (64, 32)),
    TensorRecipe("0.qkv", 0, ("0.q", "0.k", "0.v"), (64, 32)),
    TensorRecipe("1.w", 1, ("1.w",), (48, 32)),
    TensorRecipe("norm", 2, ("norm",), (32,)),
]


def test_an_image_in_huge_pages_is_built_kept_and_read_back(pool, checkpoint_directory, tmp_path):
    layout = plan_image(RECIPES, "float32")
    small_path, path = tmp_path / "small.image", tmp_path / "an.image"
    with (
        Checkpoint.open(checkpoint_directory) as checkpoint,
        Segment.create(segment_bytes(layout), "small") as small,
        Segment.create(segment_bytes(layout), "huge", HUGE_BYTES) as segment,
        Segment.create(segment_bytes(layout), "back", HUGE_BYTES) as back,
    ):
        assert (segment.page_bytes, segment.size_bytes) == (HUGE_BYTES, HUGE_BYTES)
        manifest = build_image(checkpoint, RECIPES, layout, segment)
        assert manifest == build_image(checkpoint, RECIPES, layout, small)
        assert segment.sealed
        assert read_manifest(segment.descriptor) == manifest
        verify_image(segment.descriptor, manifest)
        save_image(segment, path)
        save_image(small, small_path)
        assert path.read_bytes() == small_path.read_bytes()
        assert restore_image(path, layout, back, digest=manifest.digest) == manifest
        verify_image(back.descriptor, manifest)
        with back.map() as mapping, pytest.raises((OSError, TypeError)):
            mapping.view()[0] = 1
        with pytest.raises(DeviceError):  # sealed
            back.map_for_filling(huge_pages=False)


def test_writes_into_huge_pages_land_where_they_should_across_pages(pool):
    with Segment.create(3 * HUGE_BYTES, "writes", HUGE_BYTES) as segment:
        for offset, count in ((0, 1), (HUGE_BYTES - 3, 9), (HUGE_BYTES, HUGE_BYTES + 5)):
            data = os.urandom(count)
            write_all(segment.descriptor, data, offset)
            assert os.pread(segment.descriptor, count, offset) == data
        segment.truncate(HUGE_BYTES + 10)
        assert segment.size_bytes == 2 * HUGE_BYTES
        assert os.pread(segment.descriptor, HUGE_BYTES, HUGE_BYTES + 10).count(0) == (
            HUGE_BYTES - 10
        )
        assert os.pread(segment.descriptor, 10, HUGE_BYTES).count(0) < 10


def test_a_pool_that_is_too_small_is_known_before_anything_is_written(pool):
    free = free_bytes(HUGE_BYTES)
    with make_segment(free, "all", "auto") as segment:
        assert segment.page_bytes == HUGE_BYTES
        assert free_bytes(HUGE_BYTES) == 0  # promised, though not touched yet
        with pytest.raises(DeviceError, match="cannot be made"):
            Segment.create(HUGE_BYTES, "one more", HUGE_BYTES)
        with make_segment(HUGE_BYTES, "another", "auto") as other:
            assert other.page_bytes == SMALL_PAGE_BYTES
        make_present(segment, threads=2, huge_pages=True, cancelled=threading.Event())
    assert free_bytes(HUGE_BYTES) == free
    with contextlib.closing(make_segment(free, "off", "off")) as segment:
        assert segment.page_bytes == SMALL_PAGE_BYTES
