"""Names in the image cache's directory: found, replaced, and within what the disk can spare."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import swap.image_cache
from swap.errors import CacheFailed
from swap.image_cache import ImageCache

KIB = 1 << 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageCache:
    monkeypatch.setattr(swap.image_cache, "FREE_BYTES_MIN", 0)
    monkeypatch.setattr(swap.image_cache, "FREE_SHARE_MIN", 0.0)
    made = ImageCache(tmp_path / "images", 10 * KIB)
    made.open()
    return made


def name(character: str) -> str:
    return character * 64


def put(cache: ImageCache, character: str, size_bytes: int, used_s: int) -> Path:
    """An image whose key is the same character, doubled in meaning."""
    path = cache.path_of(name(character))
    path.write_bytes(bytes(size_bytes))
    os.utime(path, (used_s, used_s))
    cache.assign(name(character), name(character))
    return path


def kept(cache: ImageCache) -> str:
    return "".join(image.digest[0] for image in cache.images())


def test_an_image_is_found_by_its_key_and_counts_as_used(cache: ImageCache) -> None:
    put(cache, "a", KIB, 100)
    put(cache, "b", 2 * KIB, 200)
    assert kept(cache) == "ab"
    found = cache.find(name("a"))
    assert found is not None
    assert (found.digest, found.size_bytes) == (name("a"), KIB)
    assert found.path == cache.path_of(name("a"))
    assert kept(cache) == "ba"
    assert cache.find(name("c")) is None


def test_two_checkpoints_share_an_image_and_lose_it_together(cache: ImageCache) -> None:
    put(cache, "a", KIB, 100)
    cache.assign(name("d"), name("a"))
    cache.assign(name("d"), name("a"))
    for key in "ad":
        found = cache.find(name(key))
        assert found is not None
        assert found.digest == name("a")
    cache.remove(name("a"))
    assert cache.find(name("d")) is None
    assert list(cache.directory.iterdir()) == []
    cache.remove(name("a"))


def test_room_is_made_from_the_longest_unused(cache: ImageCache) -> None:
    for number, character in enumerate("abcd"):
        put(cache, character, 2 * KIB, 100 + number)
    cache.find(name("a"))
    cache.make_room(2 * KIB)
    assert kept(cache) == "bcda"
    cache.make_room(3 * KIB)
    assert kept(cache) == "cda"
    cache.make_room(10 * KIB)
    assert kept(cache) == ""


def test_an_image_over_the_budget_removes_nothing(cache: ImageCache) -> None:
    put(cache, "a", KIB, 100)
    with pytest.raises(CacheFailed, match=r"budget_bytes = 10240") as refused:
        cache.make_room(10 * KIB + 1)
    assert refused.value.metadata["needed_bytes"] == str(10 * KIB + 1)
    assert kept(cache) == "a"


def test_a_full_disk_is_kept_usable_for_others(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1 KiB less free than an image needs, one goes; with too little kept, none does."""
    put(cache, "a", 2 * KIB, 100)
    put(cache, "b", 2 * KIB, 200)

    class Disk:
        f_frsize = KIB
        f_bavail = 3
        f_blocks = 10

    monkeypatch.setattr(swap.image_cache, "FREE_SHARE_MIN", 0.0)
    monkeypatch.setattr(swap.image_cache.os, "statvfs", lambda _: Disk)
    cache.make_room(4 * KIB)
    assert kept(cache) == "b"
    with pytest.raises(CacheFailed, match="free 2048 bytes"):
        cache.make_room(7 * KIB)
    assert kept(cache) == "b"
    monkeypatch.setattr(swap.image_cache, "FREE_SHARE_MIN", 0.2)
    cache.make_room(KIB)
    assert kept(cache) == "b"  # 2 of 3 KiB stay free
    with pytest.raises(CacheFailed, match="2048 are left free"):
        cache.make_room(4 * KIB)


def test_opening_forgets_what_was_half_written_and_keeps_the_budget(cache: ImageCache) -> None:
    put(cache, "a", 6 * KIB, 100)
    put(cache, "b", 6 * KIB, 200)
    for leftover in (f"{name('c')}.image.partial", f"{name('c')}.key.partial"):
        (cache.directory / leftover).write_bytes(b"half")
    (cache.directory / "README").write_text("a user's")
    ImageCache(cache.directory, 10 * KIB).open()
    names = sorted(path.name for path in cache.directory.iterdir())
    assert names == sorted(["README", f"{name('b')}.image", f"{name('b')}.key"])


@pytest.mark.parametrize("target", ["../../etc/passwd", "x.image", ""])
def test_links_that_are_not_ours_lead_nowhere(cache: ImageCache, target: str) -> None:
    link = cache.directory / f"{name('e')}.key"
    if target:
        link.symlink_to(target)
    else:
        link.write_text("no link")
    assert cache.find(name("e")) is None
    assert cache.find("../e") is None


def test_without_a_budget_there_is_no_cache(tmp_path: Path) -> None:
    off = ImageCache(tmp_path / "images", 0)
    off.open()
    assert not off.directory.exists()
    assert off.find(name("a")) is None
    assert off.images() == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFailed, match=r"image_cache\.directory"):
        ImageCache(tmp_path / "file" / "images", KIB).open()


def test_nothing_but_a_digest_is_a_name(cache: ImageCache) -> None:
    with pytest.raises(ValueError, match="no digest"):
        cache.path_of("../x")
