"""A step between its launch and its collection.

Owns what an engine has to remember of it, and nothing that happens to it. Invariant: its draws are
in the order in which the stepper returns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.request import Request
from engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is being computed."""

    chunks: tuple[Chunk, ...]
    draws: tuple[tuple[Request, int], ...]
    """The requests that draw, and which of its tokens each draw will be."""
    launched: Any
    """The stepper's own."""
    launched_s: float
    """When, on the engine's clock."""
