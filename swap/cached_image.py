"""An image on disk: written from its sealed segment, and read back into a new one.

It owns the file's form, which is the segment's own, byte for byte, and the threads that move it.
Reading is one pass: threads take pieces in order, read each past the page cache, check it and put
it in its place while it is in the processor's cache. Every load has as many bytes under way at most
as any other, so that a disk serves several evenly. It never decides which file is whose.
Invariants: a file has its name only once it is complete and on disk; a segment is sealed only when
every tensor has its checksum, and no byte of it comes from nowhere.
"""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swap.build import Progress
from swap.checksum import BLOCK_BYTES
from swap.direct_file import ALIGNMENT_BYTES, DirectFile, ReadBuffer
from swap.errors import BuildCancelled, CacheFailed, CorruptWeights, InsufficientHostMemory
from swap.image import Manifest, image_tail, read_manifest, same_layout, segment_bytes
from swap.image_blocks import Block, BlockCheck
from swap.segment import Segment
from swap.writing import write_all, write_manifest

PIECE_BYTES = 4 << 20
READ_THREADS = 4
"""Of one load: it asks the disk for READ_THREADS x PIECE_BYTES at a time, as a build does."""
PARTIAL_SUFFIX = ".partial"


def restore_image(
    path: Path,
    layout: Manifest,
    segment: Segment,
    *,
    digest: str = "",
    threads: int = READ_THREADS,
    progress: Progress = lambda done, total: None,
    cancelled: threading.Event | None = None,
) -> Manifest:
    """Fill and seal a segment of `segment_bytes(layout)` from the image in a file.

    `layout` is what the image must be, but for checksums, digest and the sizes of pieces; `digest`
    what it must be in all, where that is known. The segment of a packed image is cut to the file's
    size. Progress is told from the reading threads, one at a time. Raises
    CorruptWeights when the file is cut, altered or another image; CacheFailed when it cannot be
    read; InsufficientHostMemory; BuildCancelled once `cancelled` is set. The segment is then
    unsealed, and its contents mean nothing.
    """
    if segment.size_bytes != segment.whole_pages(segment_bytes(layout)) or segment.sealed:
        raise ValueError(f"an image needs an unsealed segment of {segment_bytes(layout)} bytes")
    try:
        with DirectFile(path, os.O_RDONLY) as file:
            manifest = _expected(path, file.size_bytes, layout, digest)
            segment.truncate(file.size_bytes)
            stop = cancelled or threading.Event()
            _Restore(file, manifest, segment, progress, stop).run(threads)
        write_manifest(segment.descriptor, manifest)
    except EOFError as error:
        raise CorruptWeights(f"the cached image {path.name} was cut: {error}") from error
    except CorruptWeights as error:
        if path.name in str(error):
            raise
        # Found by what knows bytes and no files.
        metadata = {**error.metadata, "file": path.name}
        raise CorruptWeights(f"the cached image {path.name}: {error}", **metadata) from error
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.ENOSPC):
            raise InsufficientHostMemory(
                f"the host has no memory left for an image of {segment.size_bytes} bytes: lower "
                "the host store's budget, or free memory",
                needed_bytes=segment.size_bytes,
            ) from error
        raise CacheFailed(f"the cached image {path} cannot be read: {error}") from error
    segment.seal()
    return manifest


def save_image(segment: Segment, path: Path, *, cancelled: threading.Event | None = None) -> int:
    """Write a sealed segment to `path`, whole or not at all; returns its bytes.

    Written beside it first, made durable, then renamed. Raises CacheFailed with what to do, or
    BuildCancelled; nothing is left of the file then.
    """
    if not segment.sealed:
        raise ValueError("only a sealed segment can be kept on disk")
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        try:
            _write(segment, partial, cancelled or threading.Event())
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        hint = (
            ": free space there, or lower image_cache.budget_bytes"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else ""
        )
        raise CacheFailed(
            f"an image of {segment.size_bytes} bytes cannot be kept as {path}: {error}{hint}",
            needed_bytes=segment.size_bytes,
            directory=path.parent,
        ) from error
    return path.stat().st_size


def _write(segment: Segment, partial: Path, cancelled: threading.Event) -> None:
    partial.unlink(missing_ok=True)  # of a writer that was killed
    with (
        DirectFile(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file,
        segment.map() as mapping,
    ):
        manifest = read_manifest(segment.descriptor)
        size_bytes, stored_bytes = segment_bytes(manifest), manifest.stored_bytes
        # Taking the space first makes a full disk known before anything was written.
        os.posix_fallocate(file.descriptor, 0, size_bytes)
        # Huge pages make a segment larger than its image: its end is put together anew.
        tail_start = stored_bytes - stored_bytes % ALIGNMENT_BYTES
        for start in range(0, tail_start, PIECE_BYTES):
            if cancelled.is_set():
                raise BuildCancelled(f"writing {partial.name} was given up at byte {start}")
            file.write(mapping.view(start, min(PIECE_BYTES, tail_start - start)), start)
        tail = bytes(mapping.view(tail_start, stored_bytes - tail_start)) + image_tail(manifest)
        buffer = ReadBuffer(len(tail)).view[: len(tail)]
        buffer[:] = tail
        file.write(buffer, tail_start)
        os.fsync(file.descriptor)


def _expected(path: Path, size_bytes: int, layout: Manifest, digest: str) -> Manifest:
    """The manifest in the file, once it is what the caller's image will be."""
    size_bytes_max = segment_bytes(layout)
    if size_bytes > size_bytes_max or (size_bytes < size_bytes_max and not layout.packed):
        raise _of_another_size(path, size_bytes, size_bytes_max)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        manifest = read_manifest(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if not same_layout(manifest, layout) or (digest and manifest.digest != digest):
        raise CorruptWeights(f"the cached image {path.name} is of another model or layout")
    if size_bytes != segment_bytes(manifest):
        raise _of_another_size(path, size_bytes, segment_bytes(manifest))
    return manifest


def _of_another_size(path: Path, size_bytes: int, image_bytes: int) -> CorruptWeights:
    return CorruptWeights(
        f"the cached image {path.name} has {size_bytes} bytes, and its image {image_bytes}"
    )


class _Restore:
    """What the threads of one restore share: what is still to be read, and whether one failed."""

    def __init__(
        self,
        file: DirectFile,
        manifest: Manifest,
        segment: Segment,
        progress: Progress,
        cancelled: threading.Event,
    ) -> None:
        self._file = file
        self._descriptor = segment.descriptor
        self._check = BlockCheck(manifest, file.path.name)
        self._units = self._check.units(PIECE_BYTES)
        self._progress = progress
        self._cancelled = cancelled
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._bytes_done = 0
        self._bytes_total = manifest.stored_bytes

    def run(self, threads: int) -> None:
        """Read and check everything; raises what the first failing thread raised."""
        with ThreadPoolExecutor(threads, thread_name_prefix="restore") as pool:
            futures = [pool.submit(self._take_units) for _ in range(threads)]
        for future in futures:
            future.result()
        self._progress(self._bytes_total, self._bytes_total)

    def _take_units(self) -> None:
        buffer = ReadBuffer(max(PIECE_BYTES, BLOCK_BYTES))
        try:
            while not self._failed.is_set():
                with self._lock:
                    unit = next(self._units, None)
                if unit is None:
                    return
                if self._cancelled.is_set():
                    raise BuildCancelled(f"reading {self._file.path.name} was given up")
                self._take(unit, buffer)
        except BaseException:
            self._failed.set()
            raise

    def _take(self, unit: tuple[Block, ...], buffer: ReadBuffer) -> None:
        start, end = unit[0].start, unit[-1].end
        view = self._file.fetch(buffer, start, end)
        for block in unit:
            # Nobody else can change the buffer: what is written is what was checked.
            data = view[block.start - start : block.end - start]
            self._check.take(block, data)
            if block.tensor >= 0:  # a new segment is zeros
                write_all(self._descriptor, data, block.start)
        with self._lock:
            self._bytes_done += end - start
            self._progress(self._bytes_done, self._bytes_total)
