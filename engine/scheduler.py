"""What the next step computes: decodes, chunks of prompts, and who has to wait.

Owns the waiting and the running requests and their blocks. It never imports torch and never draws a
token. One token budget covers decodes and prompt chunks alike; decodes come first, then prompts
in order of rank (priority, then arrival). When blocks run out, the newest request of the lowest
priority gives way: it goes back to waiting with its tokens, and computes them again later unless
`park` keeps their KV. A request whose KV is parked waits like any other, and has it brought back
when it is given blocks. What the cache of prefixes has of a request's tokens is not computed again.
Blocks that no layer sees any more are given back as a request goes on (see `engine.kv_window`).

Invariants: a request is waiting, or running with the blocks that its window wants, which are all
of its own where there is none, or gone with none; a step never exceeds its budget; the waiting
request of the best rank is never overtaken, and ranks never change, so that nobody starves: a
request waits for those in front of it, and for those of better classes that arrive within CLASS_S
for each class between them.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.kv_window import UNSEEN, KvWindow
from engine.limits import EngineLimits
from engine.prefix_keys import PrefixKeys
from engine.prefixes import Prefixes
from engine.request import Parked, Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of a request, computed in one step."""

    request: Request
    start: int
    count: int

    @property
    def end(self) -> int:
        """The request's tokens that are computed afterwards."""
        return self.start + self.count

    @property
    def draws(self) -> bool:
        """Whether the chunk ends with the last token, so that the next one can be drawn."""
        return self.end == len(self.request.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: chunks to compute, and requests that cannot be run at all for want of blocks."""

    chunks: tuple[Chunk, ...]
    exhausted: tuple[Request, ...] = ()


class Scheduler:
    """Decides each step of one engine; `keys` names blocks for its prefix cache, if it has one.

    `park(request)` is asked where the KV of a request that gives way is kept, while that still has
    its blocks; None lets it be computed again. Not thread-safe.
    """

    def __init__(
        self,
        limits: EngineLimits,
        pool: BlockPool,
        window: KvWindow,
        keys: PrefixKeys | None = None,
        park: Callable[[Request], Parked | None] = lambda request: None,
    ) -> None:
        self._limits = limits
        self._pool = pool
        self.window = window
        self.prefixes = Prefixes(pool, keys, window)
        self.running: list[Request] = []
        """Best rank first."""
        self.waiting: list[Request] = []
        """Best rank first."""
        self.preemptions = 0
        self._park = park

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        bisect.insort(self.waiting, request, key=_rank)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        queue = self.running if request.blocks else self.waiting
        _take_out(queue, request)
        self._free(request)
        request.forget_kv()

    def set_aside(self, request: Request) -> list[int]:
        """Send a running request whose KV is parked back to waiting; its blocks are the caller's
        to give back."""
        _take_out(self.running, request)
        self.prefixes.stopped(request)
        self.filled(request)
        blocks, request.blocks = request.held, []
        self.add(request)
        return blocks

    def preempt(self, request: Request) -> None:
        """Send a running request back to waiting, with its tokens; their KV is lost unless it is
        parked."""
        _take_out(self.running, request)
        self._free(request)
        self.preemptions += 1
        self.add(request)

    def forget_parked(self, request: Request) -> None:
        """Have a request compute what is parked again, from the beginning."""
        if request.parked is not None and request.blocks:
            self.preempt(request)
        request.forget_kv()

    def preempt_all(self) -> None:
        """Send every running request back to waiting, with the tokens it has so far."""
        while self.running:
            self.preempt(self.running[-1])

    def filled(self, request: Request) -> None:
        """The block that was to be copied for a running request is copied, or not wanted."""
        if request.source is not None:
            self._pool.give_back((request.source,))
            request.source = None

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk was computed, and give back the blocks that nobody sees any more."""
        request = chunk.request
        request.computed = chunk.end
        self.prefixes.computed(request)
        # A block is named before it is given back: those whose tokens are not all known are not.
        unseen = self.window.unseen(min(request.computed, request.known_tokens))
        if unseen > request.unseen:
            self._pool.give_back(request.blocks[request.unseen : unseen])
            request.blocks[request.unseen : unseen] = [UNSEEN] * (unseen - request.unseen)
            request.unseen = unseen

    def schedule(self) -> StepPlan:
        """Plan the next step. Blocks for it are held when this returns."""
        exhausted = self._make_room_to_go_on()
        self._admit()
        if self.waiting and not self.running:
            # Nothing will fall free by itself, so waiting would be for ever.
            exhausted.append(self.waiting[0])
            self.remove(self.waiting[0])
        budget = self._limits.step_tokens
        chunks = []
        for request in sorted(self.running, key=_is_prompt):
            count = min(request.pending, budget)
            if count:
                chunks.append(Chunk(request, request.computed, count))
                budget -= count
        return StepPlan(tuple(chunks), tuple(exhausted))

    def _make_room_to_go_on(self) -> list[Request]:
        """Give every request the blocks of the tokens to come that it lacks, which is one where the
        next token starts it, preempting where needed."""
        exhausted = []
        for request in list(self.running):
            wanted = self.window.wanted(len(request.tokens), request.unseen)
            if request.blocks and wanted > len(request.blocks):
                while (fresh := self._pool.take(wanted - len(request.blocks))) is None:
                    victim = self.running[-1]
                    if len(self.running) == 1:
                        # Nobody is left to make room, so waiting would not help either.
                        self.remove(victim)
                        exhausted.append(victim)
                    else:
                        self._give_way(victim)
                    if victim is request:
                        break
                else:
                    request.blocks += fresh
        return exhausted

    def _admit(self) -> None:
        """Start waiting requests in order while budget, slots and blocks last."""
        while self.waiting:
            request = self.waiting[0]
            # Decodes go first whatever their rank; prompts in progress only if they rank better.
            taken = sum(
                other.pending
                for other in self.running
                if other.pending == 1 or other.rank < request.rank
            )
            if taken >= self._limits.step_tokens:
                return
            found = self.prefixes.match(request)
            if found is None:
                return
            unseen = request.unseen if request.parked is not None else found.unseen
            wanted = self.window.wanted(len(request.tokens), unseen)
            needed = wanted - max(unseen, len(found.blocks))
            clear = self._clear_way(request, needed)
            if not clear and found.source is not None:
                # The block to copy from is one more than it would need otherwise.
                found = self.prefixes.without_source(found)
                clear = self._clear_way(request, needed)
            if not clear:
                self._pool.give_back(found.held)
                return
            blocks = self._pool.take(needed)
            assert blocks is not None, "blocks were provided a moment ago"
            del self.waiting[0]
            request.unseen = unseen
            request.blocks = [*([UNSEEN] * unseen), *found.blocks[unseen:], *blocks]
            self.prefixes.admitted(request, found)
            bisect.insort(self.running, request, key=_rank)

    def _clear_way(self, request: Request, needed: int) -> bool:
        """Find a slot and blocks, preempting requests of strictly lower priority if that helps.

        Every running request is left a block to grow into, so that a new one does not push
        another out at once; a request that would run alone needs none.
        """
        lower = [
            other
            for other in self.running
            if other.priority > request.priority and other.rank > request.rank
        ]
        holds: Counter[int] = Counter()
        freed = 0
        for victims in range(len(lower) + 1):
            rest = len(self.running) - victims
            if victims:
                # What victims alone hold is free after them, and need not be provided beforehand.
                for block in lower[-victims].held:
                    holds[block] += 1
                    freed += holds[block] == self._pool.holds(block)
            if rest < self._limits.running_requests_max and self._pool.provide(
                needed + rest - freed
            ):
                for other in reversed(lower[len(lower) - victims :]):
                    self._give_way(other)
                return True
        return False

    def _give_way(self, request: Request) -> None:
        """Preempt a request for want of blocks, with its KV if that is kept."""
        if not request.incomplete:
            request.parked = self._park(request)
        self.preempt(request)

    def _free(self, request: Request) -> None:
        self.prefixes.stopped(request)
        self.filled(request)
        # Backwards, since without its first blocks nothing finds the later ones.
        self._pool.give_back(reversed(request.held))
        request.blocks = []
        request.named = 0
        if request.parked is None:
            request.computed = request.unseen = 0


def _rank(request: Request) -> tuple[float, int]:
    return request.rank


def _is_prompt(request: Request) -> bool:
    return request.pending > 1


def _take_out(queue: list[Request], request: Request) -> None:
    index = bisect.bisect_left(queue, request.rank, key=_rank)
    if index == len(queue) or queue[index] is not request:
        raise ValueError(f"request {request.id} is not where its state says")
    del queue[index]
