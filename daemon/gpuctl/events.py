"""events: the snapshot, and with -f whatever changes, one line each.

The client resumes broken streams, so a follower sees every change once, through restarts of the
daemon. It ends with Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from hotbay.v1 import watch_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.output import print_json_line
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import one_line, word


def events(session: Session, *, follow: bool, kinds: Sequence[str], resume_token: str) -> None:
    """`gpuctl events`. Events after a token have no end, so resuming means to follow."""
    for event in session.client.watch(kinds, resume_token=resume_token):
        if session.json:
            print_json_line(event)
        else:
            print_line(event_line(event))
        if event.type == watch_pb2.EVENT_TYPE_SYNCED and not follow and not resume_token:
            return


def event_line(event: watch_pb2.WatchEvent) -> str:
    """One event on one line: time, type, kind, name, sentence."""
    moment = event.time.seconds + event.time.nanos / 1e9
    clock = datetime.fromtimestamp(moment, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
    kind = word(watch_pb2.EventType.Name(event.type), "EVENT_TYPE_").lower()
    text = f"{clock}  {kind:<8} {event.kind:<10} {event.name:<24} {event.message}"
    return one_line(text).rstrip()
