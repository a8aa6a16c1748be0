"""Identifiers that make a call repeatable."""

from __future__ import annotations

import uuid


def new_request_id() -> str:
    """A request id that nobody has used."""
    return str(uuid.uuid4())
