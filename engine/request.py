"""One request inside an engine: its tokens, how far they are computed, and the blocks it holds.

Owns the state of a request and nothing that decides about it. Invariant: the first `computed`
tokens have their KV in `blocks`; all others are still to be computed, and one more token can be
drawn once none is. While `parked` is set their KV is in host memory instead, and `blocks`, if there
are any, are to be filled from there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.link.tokens import Sampling


class Parked(Protocol):
    """The KV of a request's computed tokens, kept in host memory."""

    @property
    def size_bytes(self) -> int: ...

    def restore(self, blocks: Sequence[int]) -> None:
        """Copy it into the first of `blocks`; complete when this returns."""

    def release(self) -> None:
        """Give its memory back."""


@dataclass(slots=True, eq=False)
class Request:
    """A request. `tokens` is the prompt and what was drawn since; `arrival` orders equals."""

    id: int
    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    priority: int
    arrival: int
    tokens_max: int
    """Length of prompt and output together at which the request ends."""
    stop_token_ids: frozenset[int]
    """Tokens that end it, end-of-sequence included unless it is to be ignored."""
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    parked: Parked | None = None
    counted: bool = False
    """Whether its prompt is in the statistics: preempted requests compute theirs again."""

    def forget_kv(self) -> None:
        """Give up what is parked: its tokens are to be computed again."""
        if self.parked is not None:
            self.parked.release()
            self.parked = None
            self.computed = 0

    def restore_kv(self) -> None:
        """Bring what is parked into its blocks."""
        if self.parked is not None:
            self.parked.restore(self.blocks)
            self.parked.release()
            self.parked = None

    @property
    def rank(self) -> tuple[int, int]:
        """Lower runs first and is preempted last."""
        return self.priority, self.arrival

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_tokens
