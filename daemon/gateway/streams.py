"""One sequence's life, and the mailbox its client's handler reads.

A `Stream` is one prompt with one seed on its way through HELD → SENT → STREAMING → FINISHED; the
dispatcher moves it, the handler only reads its mailbox. Nothing here waits for a client: outputs
queue in the mailbox, where max_tokens bounds them, so that a slow reader slows itself alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from daemon.gateway.errors import RequestFailed
from engine.link.tokens import Output, Sampling

if TYPE_CHECKING:
    from daemon.gateway.workers import TokenLink


class Phase(StrEnum):
    """Where a stream stands."""

    HELD = "held"  # in the gateway, waiting for its route or its worker
    SENT = "sent"  # at a worker, no token yet: can be sent again elsewhere
    STREAMING = "streaming"  # tokens have arrived: can only end
    FINISHED = "finished"


Event = tuple[int, Output | RequestFailed]


class Mailbox:
    """What happened to the streams of one client request, in order; one reader.

    An eager one wakes its reader for every output, the other only for an end or a failure.
    """

    __slots__ = ("_eager", "_events", "_waiter")

    def __init__(self, *, eager: bool) -> None:
        self._eager = eager
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, event: Output | RequestFailed) -> None:
        """Leave an event, and wake the reader if it should know now."""
        self._events.append((index, event))
        waiter = self._waiter
        if (
            waiter is not None
            and (self._eager or not isinstance(event, Output) or event.finish is not None)
            and not waiter.done()
        ):
            waiter.set_result(None)

    async def take(self) -> Sequence[Event]:
        """Wait for events and take all there are."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        events = self._events
        self._events = []
        return events


@dataclass(eq=False, slots=True)
class Stream:
    """One sequence. `index` is its place among the sequences of its client request."""

    serial: int
    """Order of arrival at this gateway; the hold queue keeps to it across replays."""
    index: int
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int
    cache_salt: str
    mailbox: Mailbox
    arrived_s: float
    """When the client's request arrived, on the monotonic clock."""
    last_output_s: float = 0.0
    phase: Phase = Phase.HELD
    link: TokenLink | None = None
    request: int = 0
    """Its number on `link`; a replay gets a new one."""
    held_since_s: float = 0.0
    hold_timer: asyncio.TimerHandle | None = field(default=None, repr=False)
