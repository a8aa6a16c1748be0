"""Segments: anonymous memory with a descriptor, in which images live and are passed around.

It owns descriptors and mappings and accounts for each: whoever holds a Segment closes it, and a
mapping outlives its segment's descriptor. It never interprets the contents. Once sealed, a segment
can neither be written to nor change its size, whoever holds it, so a reader needs no lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from types import TracebackType

from swap.errors import CorruptWeights, DeviceError
from swap.huge_pages import SMALL_PAGE_BYTES, round_up
from swap.virtual_memory import VirtualMemory, view_of

NAME_BYTES_MAX = 200

# F_SEAL_FUTURE_WRITE rather than F_SEAL_WRITE: before Linux 6.7 the latter also refuses shared
# mappings for reading, which is what workers make. The builder unmaps what it maps for writing
# before it seals, so the two protect alike; F_SEAL_SEAL keeps the former from being added by
# whoever else holds the descriptor. Python 3.11 has no name for it.
_F_SEAL_FUTURE_WRITE = 0x0010
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class Segment:
    """A memfd, owned: `close` closes it. Its memory lives while anyone has it open or mapped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    @classmethod
    def create(cls, size_bytes: int, name: str, page_bytes: int = SMALL_PAGE_BYTES) -> Segment:
        """A new segment of zeros, shown as `hotbay-image:<name>` in /proc. Raises DeviceError.

        With pages of 2 MiB or 1 GiB its size is rounded up to whole ones, which are taken from the
        host's pool at once; other segments get their memory as it is touched.
        """
        huge = page_bytes > SMALL_PAGE_BYTES
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if huge:
            flags |= os.MFD_HUGETLB | (page_bytes.bit_length() - 1) << os.MFD_HUGE_SHIFT
        label = f"hotbay-image:{name}".encode()[:NAME_BYTES_MAX].decode(errors="ignore")
        try:
            descriptor = os.memfd_create(label, flags)
        except OSError as error:
            raise DeviceError(f"a segment cannot be created: {error}") from error
        try:
            os.ftruncate(descriptor, round_up(size_bytes, page_bytes) if huge else size_bytes)
            segment = cls(descriptor)
            if huge:
                # Mapping promises the pages to the file, so that no later access can lack one.
                segment.map_for_filling(huge_pages=False).close()
        except (OSError, DeviceError) as error:
            os.close(descriptor)
            raise DeviceError(f"a segment of {size_bytes} bytes cannot be made: {error}") from error
        return segment

    @classmethod
    def adopt(cls, descriptor: int) -> Segment:
        """Take a received descriptor over; closed when it is no sealed segment.

        Raises CorruptWeights: a file that can still change must not be trusted.
        """
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CorruptWeights("a descriptor that should be an image's is no memory file")
            segment = cls(descriptor)
            if not segment.sealed:
                raise CorruptWeights("a segment is not sealed: its image was not finished")
        except OSError as error:
            raise CorruptWeights(f"a descriptor that should be an image's: {error}") from error
        except CorruptWeights:
            os.close(descriptor)
            raise
        return segment

    @property
    def sealed(self) -> bool:
        """Whether nobody can change it any more."""
        try:
            seals = fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS)
        except OSError:  # an ordinary file has no seals
            return False
        return seals & SEALS == SEALS

    def seal(self) -> None:
        """Make contents and size final. Idempotent."""
        if not self.sealed:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)

    @property
    def page_bytes(self) -> int:
        """Of the pages that it is made of; transparent huge pages show as small ones."""
        return os.fstat(self.descriptor).st_blksize

    def whole_pages(self, size_bytes: int) -> int:
        """The size that a segment of these pages has, to hold `size_bytes`."""
        page_bytes = self.page_bytes
        return round_up(size_bytes, page_bytes) if page_bytes > SMALL_PAGE_BYTES else size_bytes

    def truncate(self, size_bytes: int) -> None:
        """Cut an unsealed segment to its first bytes, or add zeros to it; pages beyond are freed.

        Of huge pages it keeps whole ones, and what is in them behind is zeros. Raises OSError.
        """
        whole_bytes = self.whole_pages(size_bytes)
        os.ftruncate(self.descriptor, whole_bytes)
        if whole_bytes > size_bytes:
            page_bytes = self.page_bytes
            with self.map_for_filling(
                huge_pages=False, offset_bytes=whole_bytes - page_bytes, size_bytes=page_bytes
            ) as last:
                behind = whole_bytes - size_bytes
                ctypes.memset(last.address + page_bytes - behind, 0, behind)
        self.size_bytes = whole_bytes

    def map(self) -> Mapping:
        """Map the whole segment for reading; the mapping needs the descriptor no longer."""
        return Mapping(self.descriptor, self.size_bytes)

    def map_for_filling(
        self, *, huge_pages: bool, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> Mapping:
        """Map the segment, or a part, for writing too; to be closed before it is sealed."""
        count = self.size_bytes - offset_bytes if size_bytes is None else size_bytes
        mapping = Mapping(self.descriptor, count, write=True, file_offset_bytes=offset_bytes)
        if huge_pages:
            mapping.prefer_huge_pages()
        return mapping

    @property
    def closed(self) -> bool:
        return self.descriptor < 0

    def detach(self) -> int:
        """Hand the descriptor over to the caller; the segment counts as closed."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def move(self) -> Segment:
        """The same segment as another object; this one counts as closed."""
        return Segment(self.detach())

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.detach())

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Mapping:
    """A segment's bytes at an address of this process, to read or to fill. `close` unmaps it.

    Have a device `register` it before copying from it, so that the copy does not fault.
    """

    def __init__(
        self,
        descriptor: int,
        size_bytes: int,
        *,
        write: bool = False,
        file_offset_bytes: int = 0,
    ) -> None:
        self._memory = VirtualMemory()
        self._write = write
        self.size_bytes = size_bytes
        self.address = self._memory.map_file(
            descriptor, size_bytes, write=write, offset=file_offset_bytes
        )
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def view(self, offset_bytes: int = 0, size_bytes: int | None = None) -> memoryview:
        """Bytes without a copy; not to be touched once the mapping is closed."""
        count = self.size_bytes - offset_bytes if size_bytes is None else size_bytes
        if self._closed or offset_bytes < 0 or count < 0 or offset_bytes + count > self.size_bytes:
            raise ValueError(f"bytes {offset_bytes} to {offset_bytes + count} are not mapped")
        view = view_of(self.address + offset_bytes, count)
        return view if self._write else view.toreadonly()

    def prefer_huge_pages(self) -> None:
        """Ask for huge pages before the memory is touched; the host may not give any."""
        self._memory.prefer_huge_pages(self.address, self.size_bytes)

    def populate(self, offset_bytes: int, size_bytes: int) -> None:
        """Make a part of the memory present; several threads may do so for parts of their own."""
        self._memory.populate(self.address + offset_bytes, size_bytes, write=self._write)

    def close(self) -> None:
        """Unmap. Nothing may copy from it any more, and no view be in use. Idempotent."""
        if not self._closed:
            self._closed = True
            self._memory.release(self.address, self.size_bytes)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
