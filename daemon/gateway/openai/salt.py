"""Who may share computed prompts with whom.

Owns the salt that goes to workers with each request: of the key the client shows, and of the
`cache_salt` it names. Requests share cached prefixes only where both are the same, so that nobody
learns from the time of an answer what others have asked. It keeps nothing, and the key itself never
leaves the gateway.
"""

from __future__ import annotations

import hashlib

SALT_BYTES = 16


def prefix_salt(authorization: bytes | None, cache_salt: str | None) -> str:
    """The salt of a request, empty where it names neither; `authorization` is the header."""
    if not authorization and not cache_salt:
        return ""
    key = hashlib.blake2b(authorization or b"", digest_size=SALT_BYTES).digest()
    return hashlib.blake2b((cache_salt or "").encode(), digest_size=SALT_BYTES, key=key).hexdigest()
