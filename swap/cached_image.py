"""An image on disk: written from its sealed segment, and read back into a new one.

It owns the file's form, which is the segment's own, byte for byte, and the threads that move it.
Reading is one pass: threads take pieces in order, make the segment's memory present there and read
past the page cache straight into it, while others check each tensor behind them. It never decides
which file is whose. Invariants: a file has its name only once it is complete and on disk; a segment
is sealed only when every tensor has its checksum, and no byte of it comes from nowhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swap.build import Progress
from swap.direct_file import DirectFile
from swap.errors import BuildCancelled, CacheFailed, CorruptWeights, InsufficientHostMemory
from swap.image import (
    Manifest,
    TensorEntry,
    checksum_of,
    read_manifest,
    same_layout,
    segment_bytes,
    write_manifest,
)
from swap.segment import Mapping, Segment

PIECE_BYTES = 8 << 20
READ_THREADS = 4
CHECK_THREADS = 2
PARTIAL_SUFFIX = ".partial"


def restore_image(
    path: Path,
    layout: Manifest,
    segment: Segment,
    *,
    digest: str = "",
    threads: int = READ_THREADS,
    huge_pages: bool = True,
    progress: Progress = lambda done, total: None,
    cancelled: threading.Event | None = None,
) -> Manifest:
    """Fill and seal a segment of `segment_bytes(layout)` from the image in a file.

    `layout` is what the image must be, checksums and digest apart; `digest` what it must be in all,
    where that is known. Progress is told from the reading threads, one at a time. Raises
    CorruptWeights when the file is cut, altered or another image; CacheFailed when it cannot be
    read; InsufficientHostMemory; BuildCancelled once `cancelled` is set. The segment is then
    unsealed, and its contents mean nothing.
    """
    if segment.size_bytes != segment_bytes(layout) or segment.sealed:
        raise ValueError(f"an image needs an unsealed segment of {segment_bytes(layout)} bytes")
    try:
        with DirectFile(path, os.O_RDONLY) as file:
            manifest = _expected(path, file.size_bytes, layout, digest)
            with segment.map_for_filling(huge_pages=huge_pages) as mapping:
                stop = cancelled or threading.Event()
                _Restore(file, manifest, mapping, progress, stop).run(threads)
        write_manifest(segment.descriptor, manifest)
    except EOFError as error:
        raise CorruptWeights(f"the cached image {path.name} was cut: {error}") from error
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
    return segment.size_bytes


def _write(segment: Segment, partial: Path, cancelled: threading.Event) -> None:
    partial.unlink(missing_ok=True)  # of a writer that was killed
    with (
        DirectFile(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file,
        segment.map() as mapping,
    ):
        # Taking the space first makes a full disk known before anything was written.
        os.posix_fallocate(file.descriptor, 0, segment.size_bytes)
        for start, end in _pieces(segment.size_bytes):
            if cancelled.is_set():
                raise BuildCancelled(f"writing {partial.name} was given up at byte {start}")
            file.write(mapping.view(start, end - start), start)
        os.fsync(file.descriptor)


def _expected(path: Path, size_bytes: int, layout: Manifest, digest: str) -> Manifest:
    """The manifest in the file, once it is what the caller's image will be."""
    if size_bytes != segment_bytes(layout):
        raise CorruptWeights(
            f"the cached image {path.name} has {size_bytes} bytes, and its image "
            f"{segment_bytes(layout)}"
        )
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        manifest = read_manifest(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if not same_layout(manifest, layout) or (digest and manifest.digest != digest):
        raise CorruptWeights(f"the cached image {path.name} is of another model or layout")
    return manifest


def _pieces(size_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size_bytes, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, size_bytes)


class _Restore:
    """What the threads of one restore share: which pieces have landed, and what failed."""

    def __init__(
        self,
        file: DirectFile,
        manifest: Manifest,
        mapping: Mapping,
        progress: Progress,
        cancelled: threading.Event,
    ) -> None:
        self._file = file
        self._manifest = manifest
        self._mapping = mapping
        self._progress = progress
        self._cancelled = cancelled
        self._changed = threading.Condition()
        self._failed = False
        self._bytes_done = 0
        self._landed: set[int] = set()
        """Starts of the pieces that have been read."""
        self._reading = _pieces(manifest.weights_bytes)
        self._checking = iter(_tensors_and_gaps(manifest))

    def run(self, threads: int) -> None:
        """Read and check everything; raises what the first failing thread raised."""
        with ThreadPoolExecutor(threads + CHECK_THREADS, thread_name_prefix="restore") as pool:
            futures = [pool.submit(self._guard, self._read) for _ in range(threads)]
            futures += [pool.submit(self._guard, self._check) for _ in range(CHECK_THREADS)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        # Whoever merely noticed that another failed has nothing to say.
        for error in errors:
            if not isinstance(error, _Abandoned):
                raise error
        total = self._manifest.weights_bytes
        self._progress(total, total)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _read(self) -> None:
        while True:
            with self._changed:
                piece = None if self._failed else next(self._reading, None)
            if piece is None:
                return
            if self._cancelled.is_set():
                raise BuildCancelled(f"reading {self._file.path.name} was given up")
            start, end = piece
            self._mapping.populate(start, end - start)
            self._file.read(self._mapping.view(start, end - start), start)
            with self._changed:
                self._landed.add(start)
                self._bytes_done += end - start
                self._progress(self._bytes_done, self._manifest.weights_bytes)
                self._changed.notify_all()

    def _check(self) -> None:
        while True:
            with self._changed:
                item = next(self._checking, None)
            if item is None:
                return
            start, end, tensor = item
            if tensor is None:
                self._check_gap(start, end)
            else:
                self._check_tensor(tensor)

    def _check_tensor(self, tensor: TensorEntry) -> None:
        hasher = hashlib.sha256()
        for view in self._views(tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes):
            hasher.update(view)
        if checksum_of(hasher) != tensor.checksum:
            raise CorruptWeights(
                f"tensor {tensor.name} in the cached image {self._file.path.name} is not what was "
                "written",
                tensor=tensor.name,
                digest=self._manifest.digest,
            )

    def _check_gap(self, start: int, end: int) -> None:
        if any(any(view) for view in self._views(start, end)):
            raise CorruptWeights(
                f"bytes {start} to {end} of the cached image {self._file.path.name}, which lie "
                "between tensors, are not zero",
                digest=self._manifest.digest,
            )

    def _views(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` to `end`, piece by piece as they land."""
        while start < end:
            piece = start // PIECE_BYTES * PIECE_BYTES
            with self._changed:
                while not self._failed and piece not in self._landed:
                    self._changed.wait()
                if self._failed:
                    raise _Abandoned
            stop = min(end, piece + PIECE_BYTES)
            yield self._mapping.view(start, stop - start)
            start = stop


class _Abandoned(Exception):
    """Another thread of the same restore failed."""


def _tensors_and_gaps(manifest: Manifest) -> Iterator[tuple[int, int, TensorEntry | None]]:
    position = 0
    for tensor in manifest.tensors:
        if tensor.offset_bytes > position:
            yield position, tensor.offset_bytes, None
        position = tensor.offset_bytes + tensor.size_bytes
        yield tensor.offset_bytes, position, tensor
    if position < manifest.weights_bytes:
        yield position, manifest.weights_bytes, None
