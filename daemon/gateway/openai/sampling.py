"""From request fields to the engine's sampling, with the bounds that depend on the model.

Pure functions. Invariant: prompt plus max_tokens never exceed the context, so the engine need not
check; and the same seed and request give the same samples, each sample of one request its own.
"""

from __future__ import annotations

import random

from daemon.gateway.errors import BadRequest
from daemon.gateway.openai.fields import ChatFields, CommonFields, CompletionFields
from engine.link.tokens import Sampling

_SEED_MASK = (1 << 63) - 1
_WORD_MASK = (1 << 64) - 1


def make_sampling(
    fields: CommonFields, *, prompt_tokens: int, context_tokens: int, output_tokens_default: int
) -> Sampling:
    """The sampling of one prompt, with seed 0. Raises BadRequest, naming the field."""
    max_tokens = _max_tokens(fields, prompt_tokens, context_tokens, output_tokens_default)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens: {min_tokens} is more than the {max_tokens} tokens of max_tokens",
            param="min_tokens",
        )
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=max(fields.top_k or 0, 0),
        top_p=1.0 if fields.top_p is None else fields.top_p,
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        logprobs=_logprobs(fields),
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        logit_bias=fields.logit_bias or {},
    )


def _max_tokens(fields: CommonFields, prompt_tokens: int, context_tokens: int, default: int) -> int:
    room = context_tokens - prompt_tokens
    param, asked = "max_tokens", fields.max_tokens
    if isinstance(fields, ChatFields) and fields.max_completion_tokens is not None:
        param, asked = "max_completion_tokens", fields.max_completion_tokens
    if asked is None:
        return min(room, default)
    if asked > room:
        raise BadRequest(
            f"{param}: {asked} tokens of output and {prompt_tokens} of prompt exceed the model's "
            f"context of {context_tokens} tokens; at most {room} fit",
            param=param,
            code="context_length_exceeded",
        )
    return asked


def _logprobs(fields: CommonFields) -> int | None:
    if isinstance(fields, ChatFields):
        return (fields.top_logprobs or 0) if fields.logprobs else None
    if isinstance(fields, CompletionFields):
        return fields.logprobs
    return None


def sample_seeds(seed: int | None, samples: int) -> list[int]:
    """A seed for each sample: the first is the client's own, the others follow from it.

    Without one they are drawn at random. All are in 0 .. 2**63 - 1.
    """
    if seed is None:
        return [random.getrandbits(63) for _ in range(samples)]
    first = seed & _SEED_MASK
    return [first, *(_mix(first, sample) for sample in range(1, samples))]


def _mix(seed: int, sample: int) -> int:
    """splitmix64: neighbouring seeds and samples give unrelated values."""
    word = (seed + sample * 0x9E3779B97F4A7C15) & _WORD_MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD_MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD_MASK
    return (word ^ (word >> 31)) & _SEED_MASK


def stop_strings(fields: CommonFields) -> tuple[str, ...]:
    """The stop strings, however they were given."""
    if fields.stop is None:
        return ()
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
