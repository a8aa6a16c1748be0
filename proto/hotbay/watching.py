"""Watching: one endless, ordered series of events over connections that may break.

A broken stream is resumed from the token of the last event, so that no event is missed or repeated.
Where the daemon no longer keeps what followed that token (it restarted, or the watcher was away too
long) the series begins anew with a snapshot: PRESENT events and SYNCED, as at its start. Whoever
keeps state from events clears it at the first PRESENT after a SYNCED.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from hotbay.connection import Connection
from hotbay.errors import HotbayError, Unavailable, Unreachable
from hotbay.patience import Clock, Outage
from hotbay.reasons import Reason
from hotbay.v1 import watch_pb2, watch_pb2_grpc


def watch(
    connection: Connection,
    *,
    clock: Clock,
    reconnect_s: float,
    kinds: Sequence[str] = (),
    resume_token: str = "",
) -> Iterator[watch_pb2.WatchEvent]:
    """Events without end, bookmarks left out. Raises when the daemon refuses or stays away."""
    stub = connection.stub(watch_pb2_grpc.WatchServiceStub)
    outage = Outage(clock, reconnect_s, answered=connection.answered)
    token = resume_token
    while True:
        stream: Any = stub.Watch(watch_pb2.WatchRequest(resume_token=token, kinds=kinds))
        try:
            for event in stream:
                connection.answered = True
                outage.over()
                token = event.resume_token or token
                if event.type != watch_pb2.EVENT_TYPE_BOOKMARK:
                    yield event
            # A stream has no end of its own: whoever ended it will not answer at once.
            outage.pause(Unavailable("the daemon ended the watch"))
        except grpc.RpcError as error:
            token = _next_token(connection.error(error), token, outage)
        finally:
            stream.cancel()


def _next_token(error: HotbayError, token: str, outage: Outage) -> str:
    """Where to go on after `error`, having waited if need be. Raises it when it is final."""
    if error.reason == Reason.RESUME_TOKEN_EXPIRED and token:
        return ""
    if error.reason == Reason.SLOW_CONSUMER:
        return error.metadata.get("resume_token", token)
    if isinstance(error, Unreachable | Unavailable):
        outage.pause(error)
        return token
    raise error
