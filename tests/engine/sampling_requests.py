"""Requests in the middle of their output, with parameters of every sort."""

from __future__ import annotations

import random
from typing import Any

from engine.link.tokens import Sampling
from engine.request import Request


def make_request(
    tokens: list[int], prompt_tokens: int, stops: tuple[int, ...] = (), **parameters: Any
) -> Request:
    return Request(
        id=0,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        sampling=Sampling(**({"max_tokens": 100} | parameters)),
        priority=0,
        arrival=0,
        tokens_max=1000,
        stop_token_ids=frozenset(stops),
    )


def random_request(chance: random.Random, vocabulary: int, **fixed: Any) -> Request:
    """A request with a random choice of parameters, those of `fixed` apart."""
    prompt = [chance.randrange(vocabulary) for _ in range(chance.randrange(1, 12))]
    output = [chance.randrange(vocabulary) for _ in range(chance.randrange(12))]
    bias = {chance.randrange(vocabulary): chance.uniform(-5, 5) for _ in range(chance.randrange(4))}
    parameters = {
        "temperature": chance.choice([0.0, 0.3, 1.0, 2.0]),
        "top_k": chance.choice([0, 0, 1, 3, vocabulary, 10 * vocabulary]),
        "top_p": chance.choice([1.0, 1.0, 0.9, 0.3, 0.001]),
        "min_p": chance.choice([0.0, 0.0, 0.05, 0.7]),
        "presence_penalty": chance.choice([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": chance.choice([0.0, 0.0, 0.7, -0.5]),
        "repetition_penalty": chance.choice([1.0, 1.0, 1.3, 0.8]),
        "min_tokens": chance.choice([0, 0, 5]),
        "logit_bias": chance.choice([{}, bias]),
        "logprobs": chance.choice([None, None, 0, 3]),
        "seed": chance.randrange(-(2**63), 2**64),
    } | fixed
    stops = tuple(chance.sample(range(vocabulary), chance.randrange(3)))
    return make_request(prompt + output, len(prompt), stops=stops, **parameters)
