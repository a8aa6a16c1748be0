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
from daemon.control.state.records import Intent, Operation, Plan, Result, Stage

PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Request:
    """Who asks: the method, the caller's id (empty: one is made up), and a hash of the rest."""

    method: str
    request_id: str = ""
    request_hash: str = ""


NOTHING_CHANGED = "nothing was changed (validate_only)"


def foreseen(
    request: Request, intent: Intent, plan: Plan, result: Result, *, bytes_total: int = 0
) -> Operation:
    """The answer to a call that was only to be checked: an operation that has ended, without a
    name."""
    now_s = time.time()
    return Operation(
        name="",
        request_id=request.request_id,
        method=request.method,
        request_hash=request.request_hash,
        intent=intent,
        created_s=now_s,
        ended_s=now_s,
        stage=Stage.PLANNING,
        plan=plan,
        bytes_total=bytes_total,
        message=NOTHING_CHANGED,
        result=result,
    )


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
