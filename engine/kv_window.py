"""Which of a request's blocks are worth holding: all, or those that a window still shows.

Owns that arithmetic for one engine; it never holds a block. Where every layer looks back only so
far, blocks that no token to come can see are given back while the request runs, and blocks of
tokens to come are taken only as far as the next step may compute: so a request of any length holds
a bounded number. One layer that sees everything is enough for nothing to be given back, since a
block has all layers. Invariant: what `wanted` says holds every token that the next step may compute
and every token that these see.
"""

from __future__ import annotations

from dataclasses import dataclass

UNSEEN = 0
"""Stands in a request's table for a block that was given back: some block, for nobody reads it."""


@dataclass(frozen=True, slots=True)
class KvWindow:
    """How far back the farthest layer looks, `tokens` 0 being to the beginning, and what a step
    computes of one request at most."""

    tokens: int
    step_tokens: int
    block_tokens: int

    @property
    def blocks_max(self) -> int | None:
        """Blocks that one request holds at most; None where it holds all of its blocks."""
        if not self.tokens:
            return None
        # What is seen from the first token of a step on, and one more that it begins within.
        return -(-(self.tokens - 1 + self.step_tokens) // self.block_tokens) + 1

    def unseen(self, computed: int) -> int:
        """First blocks that no token behind `computed` tokens sees."""
        if not self.tokens:
            return 0
        return max(0, computed - self.tokens + 1) // self.block_tokens

    def wanted(self, tokens: int, unseen: int) -> int:
        """Length of the table of a request of `tokens` tokens whose first `unseen` blocks are given
        back, those among it."""
        blocks = -(-tokens // self.block_tokens)
        return blocks if self.blocks_max is None else min(blocks, unseen + self.blocks_max)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a request holds at once at most until it has `tokens` tokens."""
        return self.wanted(tokens, 0)
