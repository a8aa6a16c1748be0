"""Which blocks have contents that can be used again, and which of those nobody uses now.

Owns the names of blocks and the order in which unused ones are forgotten: the one that was used
least recently first. It never frees a block and never looks inside one. Invariant: a name leads to
one block; a block is idle only while it has a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class CachedBlocks:
    """Blocks by the keys of their contents."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, list[bytes]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def idle(self) -> int:
        """Blocks that are kept for nobody now."""
        return len(self._idle)

    def idle_blocks(self) -> Iterator[int]:
        """Those, the one to be forgotten first first."""
        return iter(self._idle)

    def find(self, key: bytes) -> int | None:
        """The block with these contents."""
        return self._blocks.get(key)

    def name(self, key: bytes, block: int) -> None:
        """A held block has the contents that `key` names; the first to say so is believed."""
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys.setdefault(block, []).append(key)

    def rest(self, block: int) -> None:
        """Nobody holds a block with a name any more."""
        self._idle[block] = None

    def wake(self, block: int) -> bool:
        """Somebody holds a block again; whether it was idle."""
        if block not in self._idle:
            return False
        del self._idle[block]
        return True

    def forget(self, block: int) -> None:
        """A block's contents are not to be found again."""
        for key in self._keys.pop(block, ()):
            del self._blocks[key]
        self._idle.pop(block, None)

    def forget_oldest(self) -> int:
        """Forget the idle block that was used least recently, and return it."""
        block = next(iter(self._idle))
        self.forget(block)
        return block
