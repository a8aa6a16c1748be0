"""Names for the tokens that a block's keys and values depend on: a chain of keyed hashes.

Owns the hashing and nothing that is found by it. The key of a block covers its tokens, all tokens
before them, and the salt of whoever may share them. Invariant: two blocks have the same key only if
their contents are the same, but for a chance of 2**-64; and nobody can look for a collision, since
the secret is drawn for each engine and never leaves it. So keys of two models, or of two versions
of one, have nothing to do with each other either.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16
SECRET_BYTES = 32


class PrefixKeys:
    """Makes keys of blocks of `block_tokens` tokens."""

    def __init__(self, secret: bytes, block_tokens: int) -> None:
        self._secret = secret
        self._block_tokens = block_tokens

    def extend(self, keys: list[bytes], salt: str, tokens: Sequence[int], blocks: int) -> None:
        """Append the keys of full blocks of `tokens` until there are `blocks` of them."""
        size = self._block_tokens
        while len(keys) < blocks:
            start = len(keys) * size
            parent = keys[-1] if keys else self._root(salt)
            keys.append(self._key(parent, tokens[start : start + size], b"block"))

    def tail(self, keys: Sequence[bytes], salt: str, tokens: Sequence[int]) -> bytes:
        """The key of the first tokens of the block behind `keys`; never that of a full block."""
        parent = keys[-1] if keys else self._root(salt)
        return self._key(parent, tokens, b"tail")

    def _root(self, salt: str) -> bytes:
        return self._digest(salt.encode(), b"salt")

    def _key(self, parent: bytes, tokens: Sequence[int], use: bytes) -> bytes:
        return self._digest(parent + array("i", tokens).tobytes(), use)

    def _digest(self, content: bytes, use: bytes) -> bytes:
        return hashlib.blake2b(
            content, digest_size=KEY_BYTES, key=self._secret, person=use
        ).digest()
