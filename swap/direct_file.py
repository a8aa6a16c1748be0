"""Files read and written past the page cache, in large pieces from and to given memory.

It owns opening with O_DIRECT, and falling back to buffered access where a file system refuses it;
what was read or written that way is then dropped from the page cache. It owns a reader's private
memory too, which is present once it was used and used again for every piece. It never decides what
is read. What is written, and given memory, starts and ends at multiples of ALIGNMENT_BYTES; what is
fetched may start and end anywhere. Invariant: a call transfers everything it was asked for, or
raises.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ALIGNMENT_BYTES = 4096
"""What every disk's sectors and every file system's blocks divide or equal."""
_HUGE_PAGE_BYTES = 2 << 20


class ReadBuffer:
    """Aligned memory of one reader, for ranges of at most `size_bytes` at any offset.

    Reading into it and copying from there is cheaper than reading into a segment's own pages: those
    would have to be mapped one by one for the disk, for the checksum, and unmapped again.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        held_bytes = size_bytes + 2 * ALIGNMENT_BYTES
        held_bytes += -held_bytes % _HUGE_PAGE_BYTES
        memory = mmap.mmap(-1, held_bytes)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)


class DirectFile:
    """An open file. `read`, `fetch` and `write` may be called from several threads at once."""

    def __init__(self, path: Path, flags: int, mode: int = 0o600) -> None:
        self.path = path
        self.direct = True
        """Whether transfers go past the page cache."""
        self._was_cached = False
        try:
            self.descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, mode)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A file that O_CREAT made before O_DIRECT was refused is there, and ours.
            self.direct = False
            self.descriptor = os.open(path, flags & ~os.O_EXCL | os.O_CLOEXEC, mode)

    @classmethod
    def over(cls, descriptor: int, path: Path, *, direct: bool) -> DirectFile:
        """An open file, taken over. Unless `direct` is asked for, the page cache is used and kept.

        Raises OSError.
        """
        file = cls.__new__(cls)
        file.path, file.descriptor, file.direct, file._was_cached = path, descriptor, False, True
        if direct:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
                file.direct = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return file

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`. Raises OSError, and EOFError when the file ends before."""
        self._fill(view, len(view), offset)

    def fetch(self, buffer: ReadBuffer, start: int, end: int) -> memoryview:
        """The bytes from `start` to `end`, in the buffer, until it is used again.

        Raises OSError, and EOFError when the file ends before.
        """
        if not 0 <= end - start <= buffer.size_bytes:
            raise ValueError(f"a buffer of {buffer.size_bytes} bytes cannot hold {end - start}")
        first = start - start % ALIGNMENT_BYTES
        stop = end + -end % ALIGNMENT_BYTES
        if end > start:
            self._fill(buffer.view[: stop - first], end - first, first)
        return buffer.view[start - first : end - first]

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`. Raises OSError."""
        while view:
            count = self._transfer(os.pwritev, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file; what went through the page cache leaves it."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            if not self.direct and not self._was_cached:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, view: memoryview, wanted_bytes: int, offset: int) -> None:
        """Read into `view` until `wanted_bytes` are there; the file may end behind them."""
        while wanted_bytes > 0:
            count = self._transfer(os.preadv, view, offset)
            if count == 0:
                raise EOFError(f"{self.path.name} ends at byte {offset}")
            view, offset, wanted_bytes = view[count:], offset + count, wanted_bytes - count

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], view: memoryview, offset: int
    ) -> int:
        attempted_direct = self.direct
        try:
            return call(self.descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not attempted_direct:
                raise
        # Refused past the page cache; several threads may come here, and do the same.
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False
        return call(self.descriptor, [view], offset)
