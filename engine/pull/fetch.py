"""Bringing one checkpoint's files to disk: resumed where they ended, hashed as they come.

It owns the files NAME.part, which only ever grow, and their renaming to NAME once size and hash are
what the hub announced; it decides nothing about which files are needed. Invariants: a file under
its own name was checked; a byte that is on disk is not fetched again; never more is written than
was announced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from engine.errors import (
    ChecksumMismatch,
    HubUnavailable,
    InsufficientDisk,
    PullError,
    PullGivenUp,
)
from engine.link.pull import RemoteFile

PART_SUFFIX = ".part"
RETRY_DELAY_S = 0.25
RETRY_DELAY_S_MAX = 30.0
READ_BYTES = 4 << 20

Answer = TypeVar("Answer")


class Source(Protocol):
    """Where bytes come from; `engine.pull.hub.Hub` is one."""

    def open(
        self, commit: str, name: str, offset: int
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]: ...


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class Patience:
    """How long troubles that may pass are put up with, in one piece."""

    def __init__(self, patience_s: float, given_up: threading.Event) -> None:
        self._patience_s = patience_s
        self._given_up = given_up
        self.reset()

    def reset(self) -> None:
        """Something went well: start anew."""
        self._until_s = time.monotonic() + self._patience_s
        self._delay_s = RETRY_DELAY_S

    def pause(self, error: HubUnavailable) -> None:
        """Wait before another try; raises the error when there has been trouble for too long."""
        delay_s = max(self._delay_s, error.retry_after_s)
        if time.monotonic() + delay_s > self._until_s:
            raise error
        if self._given_up.wait(delay_s):
            raise PullGivenUp("the fetch was given up") from error
        self._delay_s = min(2 * self._delay_s, RETRY_DELAY_S_MAX)

    def call(self, ask: Callable[[], Answer]) -> Answer:
        """Ask until there is an answer."""
        while True:
            try:
                return ask()
            except HubUnavailable as error:
                self.pause(error)


class Fetcher:
    """One fetch of one commit into one directory."""

    def __init__(
        self,
        source: Source,
        commit: str,
        directory: Path,
        *,
        patience_s: float,
        given_up: threading.Event,
    ) -> None:
        self._source = source
        self._commit = commit
        self._directory = directory
        self._patience_s = patience_s
        self._given_up = given_up
        self._lock = threading.Lock()
        self.present_bytes = 0
        """On disk now, those of an earlier fetch included."""
        self.received_bytes = 0

    def fetch_all(self, files: tuple[RemoteFile, ...], threads: int) -> None:
        """Bring every file. Raises the first PullError; what was fetched stays for the next try."""
        self.present_bytes = sum(_present_bytes(self._directory, file) for file in files)
        with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            futures = [pool.submit(self._fetch, file) for file in files]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                self._given_up.set()  # the others end at their next chunk
        for future in sorted(futures, key=lambda each: isinstance(each.exception(), PullGivenUp)):
            future.result()
        _sync_directory(self._directory)

    def _fetch(self, file: RemoteFile) -> None:
        target = self._directory / file.name
        part = self._directory / (file.name + PART_SUFFIX)
        try:
            if _size(target) == file.size_bytes:
                return
            with part.open("a+b") as output:
                if output.tell() > file.size_bytes:
                    output.truncate(0)  # of something else, or a lie told last time
                hasher = _hasher(file)
                for chunk in _contents(part):
                    hasher.update(chunk)
                hasher = self._receive(file, output, hasher)
                self._check(file, hasher, part)
                os.fsync(output.fileno())
            part.replace(target)
        except OSError as error:
            raise _disk_trouble(error, self._directory, file) from error

    def _receive(self, file: RemoteFile, output: Appended, hasher: Hasher) -> Hasher:
        """Append what is missing; the hasher of all that is there then."""
        patience = Patience(self._patience_s, self._given_up)
        while (have := output.seek(0, os.SEEK_END)) < file.size_bytes:
            try:
                with self._source.open(self._commit, file.name, have) as (start, chunks):
                    if start != have:
                        output.truncate(0)
                        self._count(-have)
                        hasher, have = _hasher(file), 0
                    for chunk in chunks:
                        if self._given_up.is_set():
                            raise PullGivenUp("the fetch was given up")
                        if have + len(chunk) > file.size_bytes:
                            raise _too_long(file)
                        output.write(chunk)
                        output.flush()
                        hasher.update(chunk)
                        have += len(chunk)
                        self._count(len(chunk), received=len(chunk))
                        patience.reset()
                if have < file.size_bytes:
                    raise _too_short(file, have)
            except HubUnavailable as error:
                patience.pause(error)
        return hasher

    def _check(self, file: RemoteFile, hasher: Hasher, part: Path) -> None:
        expected = file.sha256 or file.git_sha1
        if not expected or hasher.hexdigest() == expected:
            return
        part.unlink()
        raise ChecksumMismatch(
            f"{file.name} arrived with the hash {hasher.hexdigest()[:16]}, and the hub announces "
            f"{expected[:16]}: it was removed; pull again, and if this recurs check the network "
            "(a proxy that alters files) and the disk",
            file=file.name,
            expected=expected,
            found=hasher.hexdigest(),
        )

    def _count(self, present: int, received: int = 0) -> None:
        with self._lock:
            self.present_bytes += present
            self.received_bytes += received


class Appended(Protocol):
    """A file open for appending."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def truncate(self, size: int | None = ..., /) -> int: ...
    def write(self, data: bytes, /) -> int: ...
    def flush(self) -> None: ...


def _hasher(file: RemoteFile) -> Hasher:
    if file.sha256 or not file.git_sha1:
        return hashlib.sha256()
    # git's name of a file's content; no signature hangs on it here, only transport.
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)


def _contents(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _present_bytes(directory: Path, file: RemoteFile) -> int:
    for name in (file.name, file.name + PART_SUFFIX):
        if 0 <= (size := _size(directory / name)) <= file.size_bytes:
            return size
    return 0


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _too_long(file: RemoteFile) -> PullError:
    return ChecksumMismatch(
        f"the hub sends more than the {file.size_bytes} bytes that it announced for {file.name}: "
        "pull again, and if this recurs check the network (a proxy that alters files)",
        file=file.name,
    )


def _too_short(file: RemoteFile, have: int) -> HubUnavailable:
    return HubUnavailable(
        f"the hub ended {file.name} after {have} of {file.size_bytes} bytes; what came is kept, "
        "and pulling again goes on there",
        file=file.name,
    )


def _disk_trouble(error: OSError, directory: Path, file: RemoteFile) -> PullError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDisk(
            f"{directory} is full at {file.name} ({file.size_bytes} bytes): make room and pull "
            "again, which goes on there, or set [models] directory to a larger disk",
            directory=str(directory),
            needed_bytes=file.size_bytes,
        )
    return PullError(
        f"{file.name} cannot be written to {directory}: {error.strerror or error}",
        directory=str(directory),
    )
