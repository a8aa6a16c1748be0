"""Packed images on disk: what comes back is what was kept, or is refused."""

from __future__ import annotations

import os

import pytest

import swap.cached_image
import swap.packed_transfer
from swap.cached_image import restore_image, save_image
from swap.checkpoint import Checkpoint
from swap.errors import CorruptWeights
from swap.identity import identify
from swap.image import (
    read_manifest,
    segment_bytes,
)
from swap.pieces import place_pieces
from swap.segment import Segment
from tests.swap.packed_images import RECIPES, images_in


@pytest.fixture
def build(tmp_path):
    yield from images_in(tmp_path)


@pytest.mark.parametrize("piece_bytes", [4096, 8 << 20])
def test_a_packed_image_comes_back_from_disk(build, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(swap.cached_image, "PIECE_BYTES", piece_bytes)
    manifest, segment, layout = build()
    path = tmp_path / "an.image"
    assert save_image(segment, path) == segment_bytes(manifest) == path.stat().st_size
    told = []
    with Segment.create(segment_bytes(layout), "back") as back:
        restored = restore_image(
            path, layout, back, digest=manifest.digest, progress=lambda *now: told.append(now)
        )
        assert restored == manifest == read_manifest(back.descriptor)
        assert back.sealed
        assert os.pread(back.descriptor, 1 << 30, 0) == path.read_bytes()
    assert told == sorted(told)
    assert told[-1] == (manifest.stored_bytes, manifest.stored_bytes)


def test_one_altered_bit_of_a_packed_image_on_disk_is_found(build, tmp_path):
    manifest, segment, layout = build()
    path = tmp_path / "an.image"
    save_image(segment, path)
    sound = path.read_bytes()
    pieces = place_pieces(manifest)
    raw = next(one for one in pieces if not one.packed)
    gaps = [one for one in pieces if one.stored_bytes % 256]
    places = [
        0,
        pieces[1].stored_offset_bytes + 9000,
        raw.stored_offset_bytes + raw.stored_bytes - 1,
        gaps[0].stored_offset_bytes + gaps[0].stored_bytes,
        gaps[-1].stored_offset_bytes + gaps[-1].stored_bytes,
        manifest.stored_bytes + 100,
        len(sound) - 20,
    ]
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with (
            Segment.create(segment_bytes(layout), "back") as back,
            pytest.raises(CorruptWeights),
        ):
            restore_image(path, layout, back)
    for cut in (1, 4096, manifest.stored_bytes):
        path.write_bytes(sound[:-cut])
        with (
            Segment.create(segment_bytes(layout), "back") as back,
            pytest.raises(CorruptWeights),
        ):
            restore_image(path, layout, back)


def test_an_image_on_disk_stands_in_only_for_one_packed_alike(build, tmp_path):
    _, segment, layout = build()
    _, plain_segment, plain_layout = build(packed=False)
    for kept, wanted in ((segment, plain_layout), (plain_segment, layout)):
        path = tmp_path / "an.image"
        save_image(kept, path)
        with (
            Segment.create(segment_bytes(wanted), "back") as back,
            pytest.raises(CorruptWeights, match=r"bytes|another model"),
        ):
            restore_image(path, wanted, back)
    with Checkpoint.open(tmp_path / "0") as checkpoint:
        keys = {identify(checkpoint, RECIPES, one).key for one in (layout, plain_layout)}
    assert len(keys) == 2
