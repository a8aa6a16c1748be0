"""What the doctor asks of the host: a few small effects, and the same as a fake.

It owns every touch of the system that a report makes; it changes nothing that outlives the call,
and it decides nothing. Files are read below `root`, so that another tree can stand for the host's.
Invariant: no effect raises for what a host may lack, and none takes more than a few seconds but for
a file system that hangs, which the caller bounds.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

FILE_BYTES_MAX = 64 << 10
PROGRAM_TIMEOUT_S = 5.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Host(Protocol):
    """The system, as far as the probes see it."""

    @property
    def root(self) -> Path:
        """The directory below which the host's files are; `/` for the real one."""
        ...

    def limit(self, kind: int) -> int | None:
        """A soft limit of this process (`resource.RLIMIT_...`); None is unlimited."""
        ...

    def program(self, name: str) -> str:
        """The path of a program, or empty."""
        ...

    def output(self, *command: str) -> str:
        """What a program writes; empty where it fails or takes too long."""
        ...

    def sealing_problem(self) -> str:
        """Why memory files cannot be sealed; empty when they can."""
        ...

    def direct_io_problem(self, directory: Path) -> str:
        """Why files in a directory cannot be opened past the page cache; empty when they can."""
        ...

    def free_bytes(self, directory: Path) -> int:
        """What a directory's file system has left; 0 where it cannot be told."""
        ...

    def descriptor_store(self) -> int | None:
        """How many descriptors the service manager keeps; None without one, -1: it does not say."""
        ...


def read(host: Host, path: str) -> str | None:
    """The text of one of the host's files; None where it cannot be read."""
    try:
        with (host.root / path.lstrip("/")).open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode("utf-8", "replace")
    except OSError:
        return None


def may(host: Host, path: str, mode: int) -> bool:
    """Whether this process may read (`os.R_OK`) or write a file of the host's."""
    return os.access(host.root / path.lstrip("/"), mode)


@dataclass(frozen=True)
class SystemHost:
    """The host that this process runs on; `stored_max` is what its notifier knows."""

    stored_max: int | None = None
    root: Path = Path("/")

    def limit(self, kind: int) -> int | None:
        soft, _ = resource.getrlimit(kind)
        return None if soft == resource.RLIM_INFINITY else soft

    def program(self, name: str) -> str:
        return shutil.which(name) or ""

    def output(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PROGRAM_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        told = done.stdout[:FILE_BYTES_MAX].decode("utf-8", "replace")
        return "" if done.returncode else told

    def sealing_problem(self) -> str:
        try:
            descriptor = os.memfd_create("hotbay-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            return str(error.strerror)
        try:
            os.ftruncate(descriptor, 4096)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            return str(error.strerror)
        finally:
            os.close(descriptor)
        return ""

    def direct_io_problem(self, directory: Path) -> str:
        """A file without a name: nothing is left, and nothing is in anybody's way."""
        flags = os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
        try:
            os.close(os.open(existing(directory), flags, 0o600))
        except OSError as error:
            return str(error.strerror)
        return ""

    def free_bytes(self, directory: Path) -> int:
        try:
            return shutil.disk_usage(existing(directory)).free
        except OSError:
            return 0

    def descriptor_store(self) -> int | None:
        return self.stored_max


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that is there: where it would be made."""
    return next(each for each in (directory, *directory.parents) if each.is_dir())


@dataclass
class FakeHost:
    """A host whose files are a tree under `root`, and whose answers are these."""

    root: Path
    limits: dict[int, int] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    outputs: dict[tuple[str, ...], str] = field(default_factory=dict)
    sealing: str = ""
    direct_io: str = ""
    free: int = 1 << 40
    stored_max: int | None = 512

    def write(self, path: str, text: str) -> None:
        """Put a file into the tree."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def limit(self, kind: int) -> int | None:
        return self.limits.get(kind)

    def program(self, name: str) -> str:
        return self.programs.get(name, "")

    def output(self, *command: str) -> str:
        return self.outputs.get(command, "")

    def sealing_problem(self) -> str:
        return self.sealing

    def direct_io_problem(self, directory: Path) -> str:
        return self.direct_io

    def free_bytes(self, directory: Path) -> int:
        return self.free

    def descriptor_store(self) -> int | None:
        return self.stored_max
