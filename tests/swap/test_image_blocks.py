"""Blocks of an image: they cover it once, and each is held against what was built."""

from __future__ import annotations

import random

import pytest

from swap.checksum import BLOCK_BYTES
from swap.errors import CorruptWeights
from swap.image_blocks import BlockCheck

ELEMENTS = (3000, 700_000, 5, 1_300_000, 10)


@pytest.fixture
def content(make_image):
    manifest, segment = make_image(3, ELEMENTS)
    with segment.map() as mapping:
        return manifest, bytearray(mapping.view(0, manifest.weights_bytes))


def take_all(manifest, content, blocks=None):
    check = BlockCheck(manifest, "an.image")
    units = [block for unit in check.units(1) for block in unit]
    for block in blocks or units:
        check.take(block, memoryview(content)[block.start : block.end])
    return units


@pytest.mark.parametrize("unit_bytes", [1, 4096, BLOCK_BYTES, 4 << 20, 1 << 40])
def test_units_cover_the_image_once_in_order_and_keep_to_their_size(content, unit_bytes):
    manifest, _ = content
    units = list(BlockCheck(manifest, "an.image").units(unit_bytes))
    position = 0
    for unit in units:
        assert unit[0].start == position
        assert len(unit) == 1 or unit[-1].end - unit[0].start <= unit_bytes
        for block in unit:
            assert block.start == position
            assert 0 < block.end - block.start <= BLOCK_BYTES
            position = block.end
    assert position == manifest.weights_bytes
    if unit_bytes > position:
        assert len(units) == 1


def test_blocks_are_right_in_any_order_and_an_altered_one_is_named(content):
    manifest, data = content
    blocks = take_all(manifest, data)
    random.Random(1).shuffle(blocks)
    take_all(manifest, data, blocks)
    for name, offset in (("t1", 2_800_000 // 2), ("t3", manifest.tensors[3].offset_bytes)):
        altered = bytearray(data)
        altered[offset] ^= 1
        with pytest.raises(CorruptWeights, match=f"tensor {name} ") as caught:
            take_all(manifest, altered, blocks)
        assert caught.value.metadata["tensor"] == name


def test_what_lies_between_tensors_must_be_zero(content):
    manifest, data = content
    first = manifest.tensors[0]
    for offset in (first.size_bytes, manifest.weights_bytes - 1):
        altered = bytearray(data)
        altered[offset] = 1
        with pytest.raises(CorruptWeights, match="between tensors"):
            take_all(manifest, altered)
