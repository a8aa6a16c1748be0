"""A note in a process's directory on who was started there, for the next daemon.

The socket is the first way to a running process; this record is the second, for one that hangs and
does not answer. It names the process by pid and start time, so that a reused pid is never mistaken
for it, and by boot id, so that nothing is believed from before a reboot.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import psutil

RECORD_NAME = "process.json"


class ProcessRecord(msgspec.Struct, frozen=True):
    """Who was started in a directory. `started_s` is the process's start, as the kernel has it."""

    pid: int
    started_s: float
    boot_id: str

    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started_s and process.status() != "zombie"
        except psutil.Error:
            return False


def write(directory: Path, pid: int, boot_id: str) -> None:
    """Note a process that was just started; one that is gone already is not noted."""
    with contextlib.suppress(psutil.NoSuchProcess):
        record = ProcessRecord(pid, psutil.Process(pid).create_time(), boot_id)
        partial = directory / (RECORD_NAME + ".partial")
        partial.write_bytes(msgspec.json.encode(record))
        partial.replace(directory / RECORD_NAME)


def read(directory: Path) -> ProcessRecord | None:
    """The record, or None when there is none that can be read."""
    try:
        return msgspec.json.decode((directory / RECORD_NAME).read_bytes(), type=ProcessRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def remove(directory: Path) -> None:
    """Forget the record. Idempotent."""
    (directory / RECORD_NAME).unlink(missing_ok=True)
