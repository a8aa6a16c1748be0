"""Files read and written past the page cache, in large aligned pieces from and to given memory.

It owns opening with O_DIRECT, and falling back to buffered access where a file system refuses it;
what was read or written that way is then dropped from the page cache. It never decides what is
read, and never allocates: memory is the caller's, and offsets, sizes and addresses are multiples of
ALIGNMENT_BYTES. Invariant: a call transfers everything it was asked for, or raises.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ALIGNMENT_BYTES = 4096
"""What every disk's sectors and every file system's blocks divide or equal."""


class DirectFile:
    """An open file. `read` and `write` may be called from several threads at once."""

    def __init__(self, path: Path, flags: int, mode: int = 0o600) -> None:
        self.path = path
        self.direct = True
        """Whether transfers go past the page cache."""
        try:
            self.descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, mode)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A file that O_CREAT made before O_DIRECT was refused is there, and ours.
            self.direct = False
            self.descriptor = os.open(path, flags & ~os.O_EXCL | os.O_CLOEXEC, mode)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`. Raises OSError, and EOFError when the file ends before."""
        while view:
            count = self._transfer(os.preadv, view, offset)
            if count == 0:
                raise EOFError(f"{self.path.name} ends at byte {offset}")
            view, offset = view[count:], offset + count

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`. Raises OSError."""
        while view:
            count = self._transfer(os.pwritev, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file; what went through the page cache leaves it."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            if not self.direct:
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
