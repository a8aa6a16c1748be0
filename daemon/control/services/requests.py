"""What all services do with a request: its identity, its policy and timeout, its pages.

Pure functions over messages; every refusal names the field.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hotbay.v1 import common_pb2

from daemon.control.config import Scheduling
from daemon.control.errors import Refused
from daemon.control.state.running import Request
from engine.link.control import InFlight

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
TIMEOUT_S_MAX = 86400.0
SENTENCE_CHARACTERS_MAX = 500

Item = TypeVar("Item")

_POLICIES = {
    common_pb2.IN_FLIGHT_POLICY_DRAIN: InFlight.DRAIN,
    common_pb2.IN_FLIGHT_POLICY_PRESERVE: InFlight.PRESERVE,
    common_pb2.IN_FLIGHT_POLICY_RECOMPUTE: InFlight.RECOMPUTE,
    common_pb2.IN_FLIGHT_POLICY_ABORT: InFlight.ABORT,
}


def invalid(field: str, message: str) -> Refused:
    """The refusal of a field's value."""
    return Refused(message, reason="INVALID_ARGUMENT", metadata={"field": field})


def identity(method: str, request: Any) -> Request:
    """Who asks: two requests that differ only in their ids have the same hash."""
    copy: Message = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    digest = hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()
    return Request(method, request.request_id, digest)


def required(field: str, value: str) -> str:
    """A field that must not be empty."""
    if not value:
        raise invalid(field, f"{field} is empty: say which one")
    return value


def short(field: str, value: str) -> str:
    """A sentence of people's, which is kept and shown."""
    if len(value) > SENTENCE_CHARACTERS_MAX:
        raise invalid(
            field,
            f"{field} has {len(value)} characters; at most {SENTENCE_CHARACTERS_MAX} are kept",
        )
    return value


def policy(request: Any, scheduling: Scheduling) -> InFlight:
    """A request's in-flight policy, or the configured one."""
    if request.in_flight == common_pb2.IN_FLIGHT_POLICY_UNSPECIFIED:
        return scheduling.in_flight
    if request.in_flight not in _POLICIES:
        raise invalid("in_flight", f"in_flight {request.in_flight} is not a known policy")
    return _POLICIES[request.in_flight]


def timeout_s(field: str, request: Any, default_s: float) -> float:
    """A duration field in seconds, or the default where it is absent."""
    if not request.HasField(field):
        return default_s
    value: Duration = getattr(request, field)
    seconds = value.seconds + value.nanos / 1e9
    if not 0 <= seconds <= TIMEOUT_S_MAX:
        raise invalid(field, f"{field} is {seconds:g} s; it must be 0 to {TIMEOUT_S_MAX:g} s")
    return seconds


def page(
    items: Sequence[Item], key: Callable[[Item], str], size: int, token: str
) -> tuple[list[Item], str]:
    """The page after `token`, and the token of the next one (empty: none). Keys are unique."""
    if size < 0:
        raise invalid("page_size", f"page_size is {size}; it must not be negative")
    size = min(size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
    start = 0
    if token:
        try:
            last = base64.urlsafe_b64decode(token.encode("ascii")).decode()
            start = 1 + next(index for index, item in enumerate(items) if key(item) == last)
        except (binascii.Error, UnicodeError, StopIteration):
            raise invalid("page_token", "page_token is of no page: list from the start") from None
    found = list(items[start : start + size])
    more = start + size < len(items)
    return found, base64.urlsafe_b64encode(key(found[-1]).encode()).decode() if more else ""
