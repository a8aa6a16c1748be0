"""How much of a file the page cache holds, so that a reader can go past it where that pays.

It owns one system call, which neither Python nor libc has a function for (cachestat, Linux 6.5). It
never reads a file and never changes what is cached. Where the call is missing nothing is known, and
a file counts as not cached.
"""

from __future__ import annotations

import ctypes
import os
import platform

_CACHESTAT = {"x86_64": 451, "aarch64": 451}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTS = 5  # cached, dirty, in writeback, evicted, recently evicted: pages each


def cached_bytes(descriptor: int) -> int:
    """Bytes of an open file that are in the page cache, in whole pages; 0 where none can say."""
    number = _CACHESTAT.get(platform.machine())
    if number is None:
        return 0
    span = (ctypes.c_uint64 * 2)(0, 0)  # offset and length; a length of 0 is to the file's end
    counts = (ctypes.c_uint64 * _COUNTS)()
    call = ctypes.CDLL(None).syscall
    failed: int = call(ctypes.c_long(number), ctypes.c_uint(descriptor), span, counts, 0)
    return 0 if failed else int(counts[0]) * _PAGE_BYTES
