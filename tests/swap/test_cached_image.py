"""Images on disk: back as they were, or refused; and never a file that is half there."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import msgspec
import pytest

import swap.cached_image
import swap.direct_file
from swap.cached_image import PARTIAL_SUFFIX, restore_image, save_image
from swap.errors import BuildCancelled, CacheFailed, CorruptWeights, InsufficientHostMemory
from swap.image import read_manifest, segment_bytes
from swap.image_check import verify_image
from swap.segment import Segment


@pytest.fixture
def cached(make_image, tmp_path):
    """An image of several pieces on disk: its layout, manifest, segment and file."""
    manifest, segment = make_image(3, (3000, 700_000, 5, 1_300_000, 10))
    path = tmp_path / "an.image"
    save_image(segment, path)
    return bare(manifest), manifest, segment, path


def bare(manifest):
    """The plan of an image that is there: without checksums and digest."""
    tensors = tuple(msgspec.structs.replace(entry, checksum="0" * 32) for entry in manifest.tensors)
    return msgspec.structs.replace(manifest, tensors=tensors, digest="0" * 64)


def content(segment):
    with segment.map() as mapping:
        return bytes(mapping.view())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece_bytes", [4096, 1 << 20, 8 << 20])
def test_an_image_comes_back_to_the_byte(cached, monkeypatch, threads, piece_bytes):
    layout, manifest, original, path = cached
    monkeypatch.setattr(swap.cached_image, "PIECE_BYTES", piece_bytes)
    told = []
    with Segment.create(segment_bytes(layout), "back") as segment:
        restored = restore_image(
            path,
            layout,
            segment,
            digest=manifest.digest,
            threads=threads,
            progress=lambda done, total: told.append((done, total)),
        )
        assert restored == manifest == read_manifest(segment.descriptor)
        assert segment.sealed
        assert content(segment) == content(original) == path.read_bytes()
        verify_image(segment.descriptor, manifest)
    assert told == sorted(told)
    assert told[-1] == (manifest.weights_bytes, manifest.weights_bytes)


def test_reading_and_writing_past_the_page_cache_is_not_needed(cached, monkeypatch, tmp_path):
    """As on a file system that refuses it, at opening or at the first transfer."""
    layout, manifest, original, _ = cached
    real_open, real_read, real_write = os.open, os.preadv, os.pwritev

    def refuse_open(name, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real_open(name, flags, mode)

    def refuse(call):
        def transfer(descriptor, views, offset):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no")
            return call(descriptor, views, offset)

        return transfer

    for number, patches in enumerate(
        ({"open": refuse_open}, {"preadv": refuse(real_read), "pwritev": refuse(real_write)})
    ):
        with monkeypatch.context() as patched:
            for name, replacement in patches.items():
                patched.setattr(swap.direct_file.os, name, replacement)
            copy = tmp_path / f"{number}.image"
            save_image(original, copy)
            with Segment.create(segment_bytes(layout), "back") as segment:
                assert restore_image(copy, layout, segment) == manifest
                assert content(segment) == content(original)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def regions(manifest, size_bytes):
    """A byte of everything an image consists of."""
    first, last = manifest.tensors[0], manifest.tensors[-1]
    return {
        "first tensor's first byte": first.offset_bytes,
        "a tensor's middle": manifest.tensors[3].offset_bytes + 2_500_000,
        "last tensor's last byte": last.offset_bytes + last.size_bytes - 1,
        "gap between tensors": first.offset_bytes + first.size_bytes + 1,
        "gap at the end": manifest.weights_bytes - 1,
        "manifest": manifest.weights_bytes + 200,
        "trailer": size_bytes - 20,
        "magic": size_bytes - 32,
    }


@pytest.mark.parametrize("region", list(range(8)))
def test_one_altered_bit_anywhere_is_found(cached, region):
    layout, manifest, _, path = cached
    name, offset = list(regions(manifest, path.stat().st_size).items())[region]
    flip(path, offset)
    with Segment.create(segment_bytes(layout), "back") as segment:
        with pytest.raises(CorruptWeights):
            restore_image(path, layout, segment)
        assert not segment.sealed, name


@pytest.mark.parametrize("keep", [0, 10, 4096, -4096, -1])
def test_a_cut_file_is_refused(cached, keep):
    layout, _, _, path = cached
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with Segment.create(segment_bytes(layout), "back") as segment:
        with pytest.raises(CorruptWeights):
            restore_image(path, layout, segment)
        assert not segment.sealed


def test_a_file_cut_while_it_is_read_is_refused(cached, monkeypatch):
    layout, _, _, path = cached
    monkeypatch.setattr(swap.cached_image, "PIECE_BYTES", 1 << 20)
    with Segment.create(segment_bytes(layout), "back") as segment:
        with pytest.raises(CorruptWeights, match="cut"):
            restore_image(
                path, layout, segment, threads=1, progress=lambda done, _: os.truncate(path, 4096)
            )
        assert not segment.sealed


def test_a_sound_image_of_another_model_is_refused(cached, make_image, tmp_path):
    layout, manifest, _, path = cached
    other, segment_of_other = make_image(4, (3000, 700_000, 5, 1_300_000, 10))
    same_size = tmp_path / "other.image"
    save_image(segment_of_other, same_size)
    assert same_size.stat().st_size == path.stat().st_size
    with Segment.create(segment_bytes(layout), "back") as segment:
        with pytest.raises(CorruptWeights, match="another model"):
            restore_image(same_size, layout, segment)  # its description differs
        with pytest.raises(CorruptWeights, match="another model"):
            restore_image(path, layout, segment, digest=other.digest)
        assert not segment.sealed
        assert restore_image(path, layout, segment, digest=manifest.digest)


def test_a_missing_file_and_a_wrong_segment_are_told_apart(cached, tmp_path):
    layout, _, original, path = cached
    with (
        Segment.create(segment_bytes(layout), "back") as segment,
        pytest.raises(CacheFailed, match="nowhere"),
    ):
        restore_image(tmp_path / "nowhere", layout, segment)
    with pytest.raises(ValueError, match="unsealed"):
        restore_image(path, layout, original)
    with (
        Segment.create(4096, "small") as small,
        pytest.raises(ValueError, match="needs an unsealed"),
    ):
        restore_image(path, layout, small)


def test_reading_and_writing_can_be_given_up(cached, tmp_path):
    layout, _, original, path = cached
    stop = threading.Event()
    stop.set()
    with Segment.create(segment_bytes(layout), "back") as segment:
        with pytest.raises(BuildCancelled):
            restore_image(path, layout, segment, cancelled=stop)
        assert not segment.sealed
    with pytest.raises(BuildCancelled):
        save_image(original, tmp_path / "given-up.image", cancelled=stop)
    assert list(tmp_path.iterdir()) == [path]


def test_memory_that_runs_out_is_said_so(cached, monkeypatch):
    layout, _, _, path = cached

    def refuse(*_):
        raise OSError(errno.ENOMEM, "out of memory")

    monkeypatch.setattr(swap.direct_file.os, "preadv", refuse)
    with (
        Segment.create(segment_bytes(layout), "back") as segment,
        pytest.raises(InsufficientHostMemory, match="lower the host store's budget"),
    ):
        restore_image(path, layout, segment)


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "budget_bytes"), (errno.EIO, "cannot be kept")]
)
def test_a_disk_that_refuses_leaves_nothing_behind(cached, monkeypatch, tmp_path, number, hint):
    _, _, original, path = cached

    def refuse(*_):
        raise OSError(number, "no")

    for call in ("posix_fallocate", "pwritev", "fsync", "rename"):
        with monkeypatch.context() as patched:
            patched.setattr(swap.cached_image.os, call, refuse)
            with pytest.raises(CacheFailed, match=hint):
                save_image(original, tmp_path / "refused.image")
        assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_written_anew(cached, tmp_path):
    _, _, original, path = cached
    again = tmp_path / "again.image"
    Path(f"{again}{PARTIAL_SUFFIX}").write_bytes(b"half")
    save_image(original, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([again, path])


def test_only_sealed_segments_are_kept(tmp_path):
    with (
        Segment.create(4096, "open") as segment,
        pytest.raises(ValueError, match="sealed"),
    ):
        save_image(segment, tmp_path / "x.image")
