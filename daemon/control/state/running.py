"""What surrounds an operation: who asked for it, what its run may do, how it ended.

Values and one handle, shared by whoever begins, runs and keeps operations; `operations` owns the
records themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from daemon.control.errors import ControlError
from daemon.control.state.journal import Drop, Put
from daemon.control.state.records import Operation, Result

PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Request:
    """Who asks: the method, the caller's id (empty: one is made up), and a hash of the rest."""

    method: str
    request_id: str = ""
    request_hash: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a `run` hands back: the result, and what is to be written together with it."""

    result: Result
    changes: tuple[Put | Drop, ...] = ()


class Handle:
    """What a running operation may do to its own record."""

    def __init__(self, live: Live, notify: Callable[[Operation], None]) -> None:
        self._live = live
        self._notify = notify
        self._notified_s = 0.0

    @property
    def name(self) -> str:
        return self._live.record.name

    @property
    def record(self) -> Operation:
        return self._live.record

    @property
    def cancelling(self) -> bool:
        """Whether somebody asked for the operation to be cancelled."""
        return self._live.cancelling

    def update(self, **changes: Any) -> None:
        """Change fields of the record; told to watchers at most every PROGRESS_INTERVAL_S, and at
        once when the stage changes."""
        before, now_s = self._live.record, time.monotonic()
        self._live.record = msgspec.structs.replace(before, **changes)
        changed = self._live.record.stage != before.stage
        if changed or now_s - self._notified_s >= PROGRESS_INTERVAL_S:
            self._notified_s = now_s
            self._notify(self._live.record)

    def cancel_by(self, abandon: Callable[[], Awaitable[None]] | None) -> None:
        """From now on cancel by calling `abandon`; None: by cancelling the task."""
        self._live.abandon = abandon


Run = Callable[[Handle], Awaitable[Outcome]]


@dataclass(eq=False)
class Live:
    """An operation in memory; `claims` and the events matter until it is done."""

    record: Operation
    claims: tuple[str, ...] = ()
    durable: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    refused: ControlError | None = None
    task: asyncio.Task[None] | None = None
    abandon: Callable[[], Awaitable[None]] | None = None
    cancelling: bool = False
