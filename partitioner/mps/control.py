"""What one MPS control daemon can be asked, as a Protocol, and the values of its answers.

It owns the vocabulary between the two text protocols and whoever shares a place. It runs nothing.
The invariants: a control daemon is of one GPU or one GPU instance, so that a fault stays there; a
limit counts only when it was read back, for a daemon takes what it does not understand in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Protocol

from partitioner.errors import MpsAnswerError
from partitioner.layout import Share

MIB = 1 << 20
_UNIT_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[KMG])i?B?")


class Language(IntEnum):
    """The text protocols of control daemons."""

    LEGACY = 2
    NAMED = 3


class ServerStatus(StrEnum):
    """How an MPS server is. In FAULT it takes no client until all that it has are gone."""

    STARTING = "starting"
    ACTIVE = "active"
    FAULT = "fault"


@dataclass(frozen=True)
class MpsServer:
    """A running server."""

    pid: int
    status: ServerStatus


@dataclass(frozen=True)
class Limits:
    """What each client of a share may have at most: ceilings, not reservations.

    With `sm_count` it has so many multiprocessors to itself, and no ceiling on threads.
    """

    memory_bytes: int
    thread_percent: int
    sm_count: int | None = None


class MpsControl(Protocol):
    """The control daemon of one place. Every method ends in bounded time, or raises `MpsError`."""

    @property
    def language(self) -> Language:
        """What it speaks."""
        ...

    @property
    def pipe_directory(self) -> Path:
        """Where its sockets are."""
        ...

    async def answers(self) -> bool:
        """Whether the daemon runs and answers."""
        ...

    async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
        """Let there be so many shares with these limits, and a server that serves them.

        Starts what does not run. What runs stays, and so do its clients, whose limits are those of
        when they came. Raises `MpsLimitError` when what is read back is not what was asked.

        Where they have multiprocessors to themselves the daemon is always a new one, and the answer
        is what clients of each share name its partition by; else it is empty.
        """
        ...

    async def limits(self, count: int) -> tuple[Limits, ...]:
        """What the daemon says that clients of the first `count` shares may have.

        Clients of a daemon that knows no shares of their own (v2) are limited further by what is in
        their environment.
        """
        ...

    async def servers(self) -> tuple[MpsServer, ...]:
        """The running servers."""
        ...

    async def clients(self) -> tuple[int, ...]:
        """Process ids of all clients, in order."""
        ...

    async def terminate(self, pid: int) -> None:
        """Take a client's contexts from it, which makes it safe to kill; its process lives on."""
        ...

    async def stop(self) -> None:
        """End the daemon and its servers. Does nothing where none runs."""
        ...

    def environment(self, number: int, limits: Limits) -> Mapping[str, str]:
        """What a process must be started with to be a client of the share of that number."""
        ...


def limits_of(share: Share, place_bytes: int) -> Limits:
    """A share's limits; one without has those of its place."""
    return Limits(
        share.memory_bytes if share.memory_bytes is not None else place_bytes,
        share.thread_percent if share.thread_percent is not None else 100,
        share.sm_count,
    )


def size_text(size_bytes: int) -> str:
    """A limit as control daemons take it: whole MiB, rounded down."""
    return f"{size_bytes // MIB}M"


def parse_size(text: str) -> int:
    """Bytes of a limit that a daemon tells, such as `3G` or `1408M`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise MpsAnswerError(f"MPS control tells {text.strip()!r} for a limit of memory")
    return int(float(match["number"]) * _UNIT_BYTES[match["unit"]])


def parse_percent(text: str) -> int:
    """Per cent that a daemon tells, such as `25.0`."""
    try:
        return round(float(text.strip().rstrip("%")))
    except ValueError:
        raise MpsAnswerError(
            f"MPS control tells {text.strip()!r} for a percentage of threads"
        ) from None


def parse_status(text: str) -> ServerStatus:
    """A server's status; words that are new are taken for one that is not ready yet."""
    word = text.strip().lower()
    if "fault" in word:
        return ServerStatus.FAULT
    return ServerStatus.ACTIVE if word in ("active", "ready") else ServerStatus.STARTING


def parse_pids(text: str) -> tuple[int, ...]:
    """Process ids, however they are set apart."""
    return tuple(sorted(int(word) for word in text.split() if word.isdigit()))
