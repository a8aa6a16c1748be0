"""Files read past the page cache: any range, whatever the file system allows, or an error."""

from __future__ import annotations

import errno
import fcntl
import os
import random

import pytest

import swap.direct_file
import swap.page_cache
from swap.direct_file import ALIGNMENT_BYTES, DirectFile, ReadBuffer
from swap.page_cache import cached_bytes

SIZE_BYTES = 3 * 65536 + 700


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(random.Random(2).randbytes(SIZE_BYTES))
    return path


def ranges():
    edges = (0, 1, 511, ALIGNMENT_BYTES, ALIGNMENT_BYTES + 1, 65536, SIZE_BYTES - 1, SIZE_BYTES)
    return [(start, end) for start in edges for end in edges if start <= end]


@pytest.mark.parametrize("direct", [True, False])
def test_any_range_is_fetched(file, direct):
    content, buffer = file.read_bytes(), ReadBuffer(SIZE_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    with DirectFile.over(descriptor, file, direct=direct) as opened:
        for start, end in ranges():
            assert bytes(opened.fetch(buffer, start, end)) == content[start:end]
        assert opened.direct == direct or direct  # a file system may refuse, never insist
    assert opened.descriptor < 0


def test_what_a_file_or_buffer_does_not_hold_is_refused(file):
    buffer = ReadBuffer(ALIGNMENT_BYTES)
    with DirectFile(file, os.O_RDONLY) as opened:
        with pytest.raises(EOFError, match="ends at byte"):
            opened.fetch(buffer, SIZE_BYTES - 10, SIZE_BYTES + 1)
        with pytest.raises(EOFError):
            opened.fetch(buffer, 10 * SIZE_BYTES, 10 * SIZE_BYTES + 5)
        with pytest.raises(ValueError, match="cannot hold"):
            opened.fetch(buffer, 0, ALIGNMENT_BYTES + 1)
        with pytest.raises(ValueError, match="cannot hold"):
            opened.fetch(buffer, 5, 4)


def test_a_file_system_that_refuses_is_read_all_the_same(file, monkeypatch):
    real_fcntl, real_read = fcntl.fcntl, os.preadv

    def refuse_flag(descriptor, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real_fcntl(descriptor, command, argument)

    def refuse_read(descriptor, views, offset):
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real_read(descriptor, views, offset)

    buffer = ReadBuffer(SIZE_BYTES)
    for target, name, replacement in (
        (swap.direct_file.fcntl, "fcntl", refuse_flag),
        (swap.direct_file.os, "preadv", refuse_read),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, replacement)
            with DirectFile.over(os.open(file, os.O_RDONLY), file, direct=True) as opened:
                assert bytes(opened.fetch(buffer, 7, SIZE_BYTES)) == file.read_bytes()[7:]
                assert not opened.direct


def test_the_page_cache_is_asked_what_it_holds(file, monkeypatch):
    descriptor = os.open(file, os.O_RDONLY)
    try:
        whole = cached_bytes(descriptor)
        assert whole == 0 or whole >= SIZE_BYTES  # just written; 0 where the kernel cannot say
        monkeypatch.setattr(swap.page_cache.platform, "machine", lambda: "unheard of")
        assert cached_bytes(descriptor) == 0
    finally:
        os.close(descriptor)
    assert cached_bytes(10_000) == 0
