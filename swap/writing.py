"""Writing into the segment or the file of an image, through its descriptor.

It owns the two ways of doing so, and no layout: what lies where is `swap.image`'s, which reading
processes load without numpy. The invariant: when a call returns, all of the data is there.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

from swap.image import Manifest, manifest_and_trailer


def write_manifest(descriptor: int, manifest: Manifest) -> None:
    """Write manifest and trailer behind the weights, into a segment of `segment_bytes`.

    A segment of huge pages may be larger: the trailer is at its very end in any case.
    """
    encoded, trailer = manifest_and_trailer(manifest)
    write_all(descriptor, encoded, manifest.stored_bytes)
    write_all(descriptor, trailer, os.fstat(descriptor).st_size - len(trailer))


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a single call may write less."""
    view = memoryview(data).cast("B")
    while view:
        try:
            written = os.pwrite(descriptor, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Files of huge pages can be mapped and read, not written.
            written = _copy_in(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _copy_in(descriptor: int, view: memoryview, offset: int) -> int:
    page_bytes = os.fstat(descriptor).st_blksize
    start = offset - offset % page_bytes
    span_bytes = -(-(offset + len(view) - start) // page_bytes) * page_bytes
    with mmap.mmap(descriptor, span_bytes, offset=start) as mapped:
        target = np.frombuffer(mapped, np.uint8)[offset - start :][: len(view)]
        np.copyto(target, np.frombuffer(view, np.uint8))  # lets other threads run
        del target
    return len(view)
