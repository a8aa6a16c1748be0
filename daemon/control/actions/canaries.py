"""The canaries of models: which one an exchange tries, and what is kept of what it drew.

It owns the rules and the journalled record. It never computes a token: a builder turns text into
tokens, a worker draws what follows. The invariant: a record is of one image, and is replaced only
by a user's wish.
"""

from __future__ import annotations

import msgspec

from daemon.control.actions.images import Images
from daemon.control.errors import Refused
from daemon.control.state.journal import Put
from daemon.control.state.records import CanaryPrompt, Intent
from daemon.control.state.registry import Registry
from engine.link.control import CANARY_PROMPT_TOKENS_MAX, Canary, CanaryRecord

RUNTIMES_MAX = 16
"""Kinds of device and software that are remembered of one canary; the oldest go first."""


async def wanted(intent: Intent, registry: Registry, images: Images) -> CanaryPrompt | None:
    """The canary that a version is to have once the operation has succeeded.

    Raises Refused (INVALID_ARGUMENT) for a text of no or too many tokens, or CallRefused.
    """
    version = registry[intent.incoming]
    if intent.forget_canary:
        return None
    if not intent.canary:
        return version.canary
    prompt = await images.tokenize(version, intent.canary)
    if not 0 < len(prompt) <= CANARY_PROMPT_TOKENS_MAX:
        raise Refused(
            f"the canary of {version.key} has {len(prompt)} tokens: give it a text of 1 to "
            f"{CANARY_PROMPT_TOKENS_MAX}",
            reason="INVALID_ARGUMENT",
            metadata={"field": "canary"},
        )
    return CanaryPrompt(intent.canary, prompt)


def asked(canary: CanaryPrompt | None, digest: str) -> Canary | None:
    """What a worker is told; what was recorded of another image is void."""
    if canary is None:
        return None
    return Canary(canary.prompt, canary.expected if canary.digest == digest else {})


def keep(
    registry: Registry,
    key: str,
    canary: CanaryPrompt | None,
    digest: str,
    record: CanaryRecord | None,
) -> list[Put]:
    """Note a version's canary, with what was recorded; returns what is to be journalled."""
    if canary is not None and record is not None:
        known = canary.expected if canary.digest == digest else {}
        kept = list({**known, record.runtime: record.tokens}.items())[-RUNTIMES_MAX:]
        canary = msgspec.structs.replace(canary, digest=digest, expected=dict(kept))
    return registry.set_canary(key, canary)
