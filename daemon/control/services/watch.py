"""The watch: everything that changes, in order, to any number of watchers.

It owns the numbered history and the watchers' queues. A change is noticed by comparing what a
resource looks like now with what was last told, leaving out what moves all the time (tokens, free
memory), so that whoever changes something need not say what. The invariants: every watcher sees the
same events in the same order, without gaps, or is ended and told from which token to resume; a slow
watcher slows nobody.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from google.protobuf.message import Message
from hotbay.v1 import watch_pb2

from daemon.control.config import Limits
from daemon.control.errors import Refused
from daemon.control.services.answers import timestamp
from daemon.control.services.describing import describe, steady

BOOKMARK_INTERVAL_S = 5.0
# Compared to notice changes; operations tell theirs, since there are many and each knows.
COMPARED = ("model", "partition", "process", "gpu")
KINDS = (*COMPARED, "operation")

Snapshot = Callable[[Iterable[str]], Mapping[str, Mapping[str, Message]]]
"""The resources of these kinds now, by kind and name."""


class Watcher:
    """One stream's queue; see `Hub.watch`."""

    def __init__(self, kinds: frozenset[str], events_max: int) -> None:
        self.kinds = kinds
        self.events: deque[watch_pb2.WatchEvent] = deque()
        self.arrived = asyncio.Event()
        self.overrun = False
        self._events_max = events_max

    def put(self, event: watch_pb2.WatchEvent) -> None:
        """Queue an event of an interesting kind, or give the watcher up."""
        if event.kind not in self.kinds or self.overrun:
            return
        if len(self.events) >= self._events_max:
            self.overrun = True
        else:
            self.events.append(event)
        self.arrived.set()


class Hub:
    """Numbers changes and hands them to watchers."""

    def __init__(self, snapshot: Snapshot, limits: Limits) -> None:
        self._snapshot = snapshot
        self._limits = limits
        self._epoch = secrets.token_hex(4)
        self._revision = 0
        # Serialised: thousands of message objects would weigh ten times as much.
        self._history: deque[tuple[int, bytes]] = deque(maxlen=limits.watch_events_max)
        self._told: dict[tuple[str, str], bytes] = {}
        self._watchers: set[Watcher] = set()
        self._due: set[str] = set()
        self.closed = False

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def refresh_soon(self, kinds: Iterable[str] = COMPARED) -> None:
        """Compare once the present callbacks are through; many changes cost one comparison."""
        if not self._due:
            asyncio.get_running_loop().call_soon(lambda: self.refresh(tuple(self._due)))
        self._due.update(kinds)

    def refresh(self, kinds: Iterable[str] = COMPARED) -> None:
        """Compare the resources of these kinds with what was last told, and tell what changed."""
        self._due.clear()
        found = self._snapshot(kinds)
        for kind, resources in found.items():
            for name, resource in resources.items():
                self._compare(kind, name, resource)
        for kind, name in [key for key in self._told if key[0] in found]:
            if name not in found[kind]:
                self.removed(kind, name)

    def changed(self, kind: str, name: str, resource: Message) -> None:
        """Tell at once that a resource changed."""
        self._tell(watch_pb2.EVENT_TYPE_CHANGED, kind, name, resource, describe(name, resource))

    def removed(self, kind: str, name: str) -> None:
        """Tell at once that a resource is gone."""
        self._told.pop((kind, name), None)
        self._tell(watch_pb2.EVENT_TYPE_REMOVED, kind, name, None, f"{kind} {name} is gone")

    def _compare(self, kind: str, name: str, resource: Message) -> None:
        look = steady(resource).SerializeToString(deterministic=True)
        if self._told.get((kind, name)) != look:
            self._told[kind, name] = look
            self.changed(kind, name, resource)

    def _tell(self, type_: Any, kind: str, name: str, resource: Any, message: str) -> None:
        self._revision += 1
        event = self._event(type_, kind, name, resource, message)
        self._history.append((self._revision, event.SerializeToString()))
        for watcher in self._watchers:
            watcher.put(event)

    def _event(
        self, type_: Any, kind: str = "", name: str = "", resource: Any = None, message: str = ""
    ) -> watch_pb2.WatchEvent:
        event = watch_pb2.WatchEvent(
            type=type_,
            revision=self._revision,
            resume_token=f"{self._epoch}:{self._revision}",
            time=timestamp(time.time()),
            kind=kind,
            name=name,
            message=message,
        )
        if resource is not None:
            getattr(event, kind).CopyFrom(resource)
        return event

    async def watch(
        self, resume_token: str, kinds: Iterable[str]
    ) -> AsyncGenerator[watch_pb2.WatchEvent, None]:
        """The stream of one watcher, without end.

        Raises Refused: INVALID_ARGUMENT, RESUME_TOKEN_EXPIRED, QUEUE_FULL (too many watchers), or
        SLOW_CONSUMER with the token to resume from.
        """
        wanted = frozenset(kinds) or frozenset(KINDS)
        if not wanted <= set(KINDS):
            raise Refused(
                f"kinds {sorted(wanted - set(KINDS))} are not known; known are {', '.join(KINDS)}",
                reason="INVALID_ARGUMENT",
                metadata={"field": "kinds"},
            )
        if len(self._watchers) >= self._limits.watchers_max:
            raise Refused(
                f"{self._limits.watchers_max} watchers are connected (limits.watchers_max)",
                reason="QUEUE_FULL",
            )
        watcher = Watcher(wanted, self._limits.watcher_events_max)
        # Nothing awaits between looking at the present and joining: no change can fall between.
        self.refresh()
        backlog = self._since(resume_token) if resume_token else self._present()
        self._watchers.add(watcher)
        token = resume_token
        try:
            for event in backlog:
                if event.kind in wanted or not event.kind:
                    token = event.resume_token
                    yield event
            async for event in self._follow(watcher):
                token = event.resume_token
                yield event
            if watcher.overrun:
                raise Refused(
                    f"more than {self._limits.watcher_events_max} events were waiting to be read "
                    "(limits.watcher_events_max)",
                    reason="SLOW_CONSUMER",
                    metadata={"resume_token": token},
                )
            raise Refused("the daemon is stopping", reason="DAEMON_DRAINING")
        finally:
            self._watchers.discard(watcher)

    async def _follow(self, watcher: Watcher) -> AsyncGenerator[watch_pb2.WatchEvent, None]:
        while not watcher.overrun and not self.closed:
            if watcher.events:
                yield watcher.events.popleft()
                continue
            watcher.arrived.clear()
            try:
                async with asyncio.timeout(BOOKMARK_INTERVAL_S):
                    await watcher.arrived.wait()
            except TimeoutError:
                yield self._event(watch_pb2.EVENT_TYPE_BOOKMARK)

    def close(self) -> None:
        """End every stream."""
        self.closed = True
        for watcher in self._watchers:
            watcher.arrived.set()

    def _present(self) -> list[watch_pb2.WatchEvent]:
        events = [
            self._event(
                watch_pb2.EVENT_TYPE_PRESENT, kind, name, resource, describe(name, resource)
            )
            for kind, resources in self._snapshot(KINDS).items()
            for name, resource in resources.items()
        ]
        return [*events, self._event(watch_pb2.EVENT_TYPE_SYNCED)]

    def _since(self, token: str) -> list[watch_pb2.WatchEvent]:
        epoch, _, number = token.partition(":")
        oldest = self._history[0][0] if self._history else self._revision + 1
        known = epoch == self._epoch and number.isdecimal()
        if not known or not oldest - 1 <= int(number) <= self._revision:
            raise Refused(
                "the events after this token are no longer kept, or are an earlier daemon's: "
                "watch again without a token",
                reason="RESUME_TOKEN_EXPIRED",
                metadata={"resume_token": token},
            )
        return [
            watch_pb2.WatchEvent.FromString(data)
            for revision, data in self._history
            if revision > int(number)
        ]
