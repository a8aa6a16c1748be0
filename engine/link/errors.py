"""Errors of the links.

    LinkError
    ├── LinkClosed       the peer went away, or this side closed the link
    ├── LinkCongested    the peer reads too slowly: the outgoing queue is full
    ├── FrameInvalid     bytes that are no frame, or a message this link does not carry
    └── CallTimedOut     the peer did not reply in time

Messages name the link (`gateway`, `worker gpu0`), so that a log line says who is meant.
"""

from __future__ import annotations


class LinkError(Exception):
    """Anything that goes wrong on a link."""


class LinkClosed(LinkError):
    """The link is closed. Reconnect, or treat the peer as gone."""


class LinkCongested(LinkError):
    """The outgoing queue is full. Wait with `send`, or drop the peer."""


class FrameInvalid(LinkError):
    """The peer sent something this link does not carry. The link is closed: versions differ."""


class CallTimedOut(LinkError):
    """No reply within the deadline. The call may still take effect; ask the peer's state."""
