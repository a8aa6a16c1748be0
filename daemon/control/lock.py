"""The lock that makes hotbayd the only one on a directory.

An flock on `hotbayd.lock` in each directory, held for the daemon's life and dropped by the kernel
with it: no stale locks. gRPC itself would silently take over a live Unix socket, so this lock comes
before anything else. Directories are made 0700 and refused when somebody else could write to them.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from daemon.control.errors import AlreadyRunning, ControlError

LOCK_NAME = "hotbayd.lock"


class DirectoryLock:
    """An exclusive hold on a directory; see `acquire`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> DirectoryLock:
        """Create `directory` (0700) if missing and lock it.

        Raises AlreadyRunning naming the holder's pid, or ControlError when the directory is not
        this user's own.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid != os.geteuid():
            raise ControlError(
                f"{directory} belongs to uid {found.st_uid}, not to uid {os.geteuid()}: "
                "give the daemon a directory of its own",
                reason="INVALID_ARGUMENT",
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            directory.chmod(0o700)
        path = directory / LOCK_NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise AlreadyRunning(
                f"another hotbayd (pid {holder}) is using {directory}: stop it, or start this one "
                "with --state-dir and --runtime-dir of its own",
                metadata={"pid": holder, "directory": str(directory)},
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(path, descriptor)

    def release(self) -> None:
        """Give the directory up. Idempotent; the file stays, since removing it would race."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
