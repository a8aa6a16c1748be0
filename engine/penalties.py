"""What changes logits before a token is chosen: banned tokens, biases, penalties of repetition.

Owns the meaning of each, which is vLLM's, and their order: stop tokens are banned until
`min_tokens` are drawn, biases are added, and then what occurred is penalised: `repetition_penalty`
over prompt and output, `frequency_penalty` and `presence_penalty` over the output alone. Rows that
ask for none of it are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.request import Request
from engine.sampling_rows import is_penalised

Index = npt.NDArray[np.int64]


def is_adjusted(request: Request) -> bool:
    """Whether a request's logits are changed at all."""
    sampling = request.sampling
    return (
        bool(sampling.logit_bias)
        or (request.generated < sampling.min_tokens and bool(request.stop_token_ids))
        or is_penalised(request)
    )


def adjust(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Change `logits` [requests, vocabulary] in place."""
    _ban_stops(logits, requests)
    _add_biases(logits, requests)
    penalised = [row for row, request in enumerate(requests) if is_penalised(request)]
    if penalised:
        _penalise(logits, requests, penalised)


def _ban_stops(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    for row, request in enumerate(requests):
        if request.generated < request.sampling.min_tokens:
            stops = [token for token in request.stop_token_ids if 0 <= token < logits.shape[1]]
            rows += [row] * len(stops)
            tokens += stops
    if rows:
        logits[rows, tokens] = float("-inf")


def _add_biases(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    biases: list[float] = []
    for row, request in enumerate(requests):
        for token, bias in request.sampling.logit_bias.items():
            if 0 <= token < logits.shape[1]:
                rows.append(row)
                tokens.append(token)
                biases.append(bias)
    if rows:
        logits[rows, tokens] += torch.tensor(biases, dtype=logits.dtype)


def _penalise(logits: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]) -> None:
    """Change only the logits of tokens that occurred, each once."""
    places, outputs = _occurrences(requests, rows, logits.shape[1])
    at = torch.from_numpy(places[0]), torch.from_numpy(places[1])
    count = torch.from_numpy(outputs).to(logits.dtype)

    def strength(name: str) -> torch.Tensor:
        values = [getattr(request.sampling, name) for request in requests]
        return torch.tensor(values, dtype=logits.dtype)[at[0]]

    values, repetition = logits[at], strength("repetition_penalty")
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= strength("frequency_penalty") * count
    values -= strength("presence_penalty") * (count > 0)
    logits[at] = values


def _occurrences(
    requests: Sequence[Request], rows: Sequence[int], vocabulary: int
) -> tuple[tuple[Index, Index], Index]:
    """Distinct (row, token) that occur in prompt or output, and how often each was drawn."""
    tokens = np.concatenate([np.array(requests[row].tokens, dtype=np.int64) for row in rows])
    lengths = [len(requests[row].tokens) for row in rows]
    drawn = np.concatenate(
        [
            np.arange(length) >= requests[row].prompt_tokens
            for row, length in zip(rows, lengths, strict=True)
        ]
    )
    keys = np.repeat(np.array(rows, dtype=np.int64), lengths) * vocabulary + tokens
    distinct, inverse = np.unique(keys, return_inverse=True)
    counts = np.bincount(inverse, weights=drawn, minlength=len(distinct)).astype(np.int64)
    return (distinct // vocabulary, distinct % vocabulary), counts
