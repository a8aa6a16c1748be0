"""Why one request cannot be run: in words that name the figure and what to change.

Owns the checks of a request against an engine's limits, and their messages; pure. Invariant: what
passes `refusal` can be scheduled, and ends by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.limits import EngineLimits
from engine.link.tokens import Sampling
from engine.models.spec import ModelSpec


def refusal(
    prompt: Sequence[int], sampling: Sampling, limits: EngineLimits, spec: ModelSpec, waiting: int
) -> str:
    """Why a request is not taken, with `waiting` before it; empty if it is."""
    if not prompt:
        return "the prompt has no tokens"
    if len(prompt) >= limits.context_tokens:
        return (
            f"the prompt has {len(prompt)} tokens, and the context of {limits.context_tokens} "
            "must hold at least one more: shorten it"
        )
    if sampling.max_tokens < 1:
        return f"max_tokens is {sampling.max_tokens}; it must be at least 1"
    if min(prompt) < 0 or max(prompt) >= spec.vocabulary:
        return f"the prompt holds a token outside the vocabulary of {spec.vocabulary}"
    if waiting >= limits.waiting_requests_max:
        return f"{waiting} requests wait already: try again later"
    return ""


def no_room(tokens: int, needed_bytes: int) -> str:
    """Why a request of `tokens` tokens ends, for which there are no blocks."""
    return (
        f"no KV memory is left to run it: its {tokens} tokens take {needed_bytes} bytes, and other "
        "models have what is not this one's: send it again later, or shorten it"
    )
