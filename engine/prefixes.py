"""Prompts that begin alike: what is computed once, for all requests that may share it.

Owns the search for blocks that hold a request's first tokens, the naming of blocks as they are
computed, and the knowledge of who is just computing what. It never frees or takes a block and never
imports torch. Full blocks are shared as they are, since nobody writes to them again. The block that
a prompt ends in is copied, because everyone goes on writing to it: of several samples of one prompt
the others compute its last token alone. Where layers see no farther than a window, a run of blocks
is as good without those that lie before it. A request whose next block is being computed by one of
better rank waits for that rather than compute it too. Invariants: the last token of a request is
never taken from the cache, because its successor is drawn from it; requests find only what was
computed for the same salt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.block_pool import BlockPool
from engine.kv_window import UNSEEN, KvWindow
from engine.prefix_keys import PrefixKeys
from engine.request import Request


@dataclass(frozen=True, slots=True)
class Match:
    """What was found of a request's tokens; `blocks`, behind the first `unseen`, and `source` are
    held once for it."""

    blocks: tuple[int, ...] = ()
    """Its first blocks, to be shared."""
    unseen: int = 0
    """Of these, how many are not needed, since nothing that is still to be computed sees them; they
    need not be there."""
    source: int | None = None
    """A block that is to be copied to the one behind them."""
    tokens: int = 0
    """Tokens that need not be computed."""

    @property
    def held(self) -> tuple[int, ...]:
        """All blocks held, the last of the sequence first: what is given back first is forgotten
        first."""
        source = () if self.source is None else (self.source,)
        return (*source, *reversed(self.blocks[self.unseen :]))


NOTHING = Match()


class Prefixes:
    """The prefix cache of one engine, over its pool; `keys` is None where it has none."""

    def __init__(self, pool: BlockPool, keys: PrefixKeys | None, window: KvWindow) -> None:
        self.lookup_tokens = 0
        """Of prompts that were looked for."""
        self.hit_tokens = 0
        """Of those, what was found."""
        self._pool = pool
        self._keys = keys
        self._window = window
        self._block_tokens = window.block_tokens
        self._computing: dict[bytes, Request] = {}

    def match(self, request: Request) -> Match | None:
        """Hold what there is of a waiting request's tokens; None while another one of better rank
        computes more of them."""
        if self._keys is None or request.parked is not None:
            return NOTHING
        # The last token is always computed: what comes after it is drawn from that.
        wanted = len(request.tokens) - 1
        full = wanted // self._block_tokens
        self._keys.extend(request.keys, request.cache_salt, request.tokens, full)
        blocks, unseen = self._find_blocks(request.keys[:full])
        source, tokens = None, len(blocks) * self._block_tokens
        missing = self._tail_key(request) if len(blocks) == full else request.keys[len(blocks)]
        if missing is not None:
            source = self._pool.find(missing)
            if source is not None:
                tokens = wanted
            else:
                other = self._computing.get(missing)
                if other is not None and other.rank < request.rank:
                    return None
        found = Match(blocks, unseen, source, tokens)
        self._pool.share(found.held)
        return found

    def _find_blocks(self, keys: Sequence[bytes]) -> tuple[tuple[int, ...], int]:
        """The longest run of first blocks, of which those that are still seen must be there, and
        how many first ones are not seen."""
        blocks: list[int] = []
        gap, longest = 0, 0
        for index, key in enumerate(keys):
            block = self._pool.find(key)
            if block is None:
                gap = index + 1
                if not self._window.tokens:
                    break
            blocks.append(UNSEEN if block is None else block)
            if gap <= self._window.unseen((index + 1) * self._block_tokens):
                longest = index + 1
        return tuple(blocks[:longest]), self._window.unseen(longest * self._block_tokens)

    def without_source(self, found: Match) -> Match:
        """The same, but for the block to be copied."""
        assert found.source is not None
        self._pool.give_back((found.source,))
        return replace(found, source=None, tokens=len(found.blocks) * self._block_tokens)

    def admitted(self, request: Request, found: Match) -> None:
        """A request runs now with what was found, and computes the rest."""
        # What is parked has its seen blocks alone to name.
        request.named = max(len(found.blocks), request.unseen)
        if request.parked is None:
            request.computed = found.tokens
            request.source = found.source
        if self._keys is None:
            return
        if not request.looked_up:
            request.looked_up = True
            request.cached_tokens = found.tokens
            self.lookup_tokens += request.prompt_tokens
            self.hit_tokens += found.tokens
        full = request.known_tokens // self._block_tokens
        self._keys.extend(request.keys, request.cache_salt, request.tokens, full)
        for key in self._own_keys(request):
            self._computing.setdefault(key, request)

    def computed(self, request: Request) -> None:
        """Tokens of a running request were computed: name the blocks that have become whole."""
        if self._keys is None:
            return
        # A token that is still being drawn has no value yet: its block is named the next time.
        full = min(request.computed, request.known_tokens) // self._block_tokens
        self._keys.extend(request.keys, request.cache_salt, request.tokens, full)
        for index in range(request.named, full):
            self._name(request, request.keys[index], index)
        request.named = max(request.named, full)
        # Everything before the last token is there; the block goes on being written behind it.
        if request.computed == request.prompt_tokens and not request.generated:
            key = self._tail_key(request)
            if key is not None:
                self._name(request, key, (request.prompt_tokens - 1) // self._block_tokens)

    def stopped(self, request: Request) -> None:
        """A request does not run any more: nobody is to wait for it."""
        if self._keys is not None:
            for key in self._own_keys(request):
                self._release(request, key)

    def forget(self, request: Request) -> None:
        """Let nobody find anything that this request had computed, or had found."""
        self._pool.forget(request.keys)
        if request.tail_key:
            self._pool.forget((request.tail_key,))

    def _name(self, request: Request, key: bytes, index: int) -> None:
        self._pool.name(key, request.blocks[index])
        self._release(request, key)

    def _release(self, request: Request, key: bytes) -> None:
        if self._computing.get(key) is request:
            del self._computing[key]

    def _own_keys(self, request: Request) -> list[bytes]:
        """Keys of blocks that it is still to fill with tokens that are known now."""
        tail = self._tail_key(request)
        return request.keys[request.named :] + ([] if tail is None else [tail])

    def _tail_key(self, request: Request) -> bytes | None:
        """The key of the prompt's last tokens but one, behind its full blocks; None if there are
        none, or if the request has gone on from there."""
        if request.generated or self._keys is None:
            return None
        if request.tail_key is None:
            wanted = request.prompt_tokens - 1
            full = wanted // self._block_tokens
            tokens = request.tokens[full * self._block_tokens : wanted]
            self._keys.extend(request.keys, request.cache_salt, request.tokens, full)
            keys = request.keys[:full]
            request.tail_key = self._keys.tail(keys, request.cache_salt, tokens) if tokens else b""
        return request.tail_key or None
