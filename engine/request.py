"""One request inside an engine: its tokens, how far they are computed, and the blocks it holds.

Owns the state of a request and nothing that decides about it. Invariant: the first `computed`
tokens have their KV in `blocks`, but for those that nobody sees any more, whose blocks are given
back; all others are still to be computed, and one more token can be drawn once none is. While
`parked` is set their KV is in host memory instead, and `blocks`, if there are any, are to be filled
from there first; while `source` is set, part of it is in that block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.link.tokens import Sampling

UNDRAWN = -1
"""The last token of a request whose draw is on its way from the device."""
CLASS_S = 10.0
"""What one step of priority is worth: a request goes before those of the next worse class that
arrived less than this long before it, and after those that have waited longer."""


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
    """The table of its blocks, in which UNSEEN stands for each of the first `unseen`."""
    unseen: int = 0
    """Blocks of its first computed tokens that were given back, or never taken, because no token to
    come sees them; kept with `computed` while its KV is parked."""
    parked: Parked | None = None
    counted: bool = False
    """Whether its prompt is in the statistics: preempted requests compute theirs again."""
    arrived_s: float = 0.0
    """When it arrived, on any clock that all requests share."""

    cache_salt: str = ""
    """Prefixes are shared with requests of the same salt."""
    keys: list[bytes] = field(default_factory=list)
    """Names of its first full blocks (see `engine.prefix_keys`), as far as anybody asked."""
    tail_key: bytes | None = None
    """The name of what its prompt has behind full blocks; empty if that is nothing."""
    named: int = 0
    """Of its blocks, the first ones that are known by their names."""
    source: int | None = None
    """A block, held for it, that is to be copied to the first of its blocks that it has for itself
    alone."""
    looked_up: bool = False
    cached_tokens: int = 0
    """Prompt tokens that were found computed when it first ran."""

    def forget_kv(self) -> None:
        """Give up what is parked: its tokens are to be computed again."""
        if self.parked is not None:
            self.parked.release()
            self.parked = None
            # Its table must not have gaps when it is computed from the beginning.
            assert not self.blocks, "a request that holds blocks is to be preempted first"
            self.computed = self.unseen = 0

    def restore_kv(self) -> None:
        """Bring what is parked into its blocks."""
        if self.parked is not None:
            self.parked.restore(self.held)
            self.parked.release()
            self.parked = None

    @property
    def held(self) -> list[int]:
        """The blocks that it holds."""
        return self.blocks[self.unseen :]

    @property
    def rank(self) -> tuple[float, int]:
        """Lower runs first and is preempted last.

        It never changes, and only what arrives within a bounded time can get in front of it: so
        nobody waits for ever.
        """
        return self.arrived_s + self.priority * CLASS_S, self.arrival

    @property
    def incomplete(self) -> bool:
        """Whether KV of computed tokens is yet to be brought to its blocks."""
        return self.parked is not None or self.source is not None

    @property
    def known_tokens(self) -> int:
        """Tokens whose values are known to the host: all but a last one that is UNDRAWN."""
        return len(self.tokens) - (self.tokens[-1] == UNDRAWN)

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_tokens
