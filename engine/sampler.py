"""From logits to tokens, for all rows of a step at once.

Owns the choice of a token and the report of its probability. It never keeps state: a draw depends
on the row's logits, its parameters and (seed, position) alone, so it is the same in any batch. Rows
pay for what they ask for: greedy ones for a maximum, and only those with a filter for a partial
sort. The order of operations is vLLM's: log probabilities are of the raw logits; then come
penalties, temperature, and the filters top-k, top-p (over what top-k left) and min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.link.tokens import TokenLogprob
from engine.penalties import adjust, is_adjusted
from engine.philox import uniform
from engine.request import Request
from engine.sampling_rows import TEMPERATURE_GREEDY

CANDIDATES = 512
"""Likeliest tokens that filters look at first; more are sorted only if these do not suffice."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token; None when the row's logits hold something that is no number."""

    token: int | None
    logprob: TokenLogprob | None = None


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[Draw]:
    """Draw the next token of each request from its row of `logits` [requests, vocabulary].

    `logits` may be changed. They are brought to the host, where tokens are drawn: for a device this
    also is the wait for the step.
    """
    logits = logits.float().cpu().contiguous()
    # Ten times as fast as torch's own; it finds what is not a number before any number.
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))
    valid = torch.isfinite(logits.gather(1, tokens[:, None]).squeeze(1))
    wanted = [row for row, one in enumerate(requests) if one.sampling.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
    adjusted = [row for row, request in enumerate(requests) if is_adjusted(request)]
    if adjusted:
        part = logits[adjusted]
        adjust(part, [requests[row] for row in adjusted])
        logits[adjusted] = part
        tokens[adjusted] = part.argmax(dim=1)
    random = [
        row
        for row, request in enumerate(requests)
        if request.sampling.temperature >= TEMPERATURE_GREEDY
    ]
    if random:
        tokens[random] = _draw(logits[random], [requests[row] for row in random])
    drawn = tokens.tolist()
    reports = dict(zip(wanted, _reports(raw, wanted, drawn, requests), strict=True))
    return [
        Draw(token, reports.get(row)) if ok else Draw(None)
        for row, (token, ok) in enumerate(zip(drawn, valid.tolist(), strict=True))
    ]


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Tokens drawn by temperature and filters, [requests]."""
    temperatures = torch.tensor([request.sampling.temperature for request in requests])
    logits = logits / temperatures[:, None]
    filtered = [row for row, request in enumerate(requests) if _is_filtered(request)]
    if filtered:
        part = logits[filtered]
        floor = _floors(part, [requests[row] for row in filtered])
        logits[filtered] = part.masked_fill_(part < floor[:, None], float("-inf"))
    # The inverse of the cumulated distribution, in float64 so that a large vocabulary's rounding
    # errors stay below what one draw can see.
    cumulated = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
    numbers = uniform(
        [request.sampling.seed for request in requests],
        [len(request.tokens) for request in requests],
    )
    total = cumulated[:, -1:]
    # Rounding must not carry the target onto the total, behind which there is no token.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(torch.from_numpy(numbers)[:, None] * total, below)
    return (
        torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    )


def _is_filtered(request: Request) -> bool:
    sampling = request.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _floors(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """The lowest logit that each row's filters keep, [requests]; equals share one fate."""
    vocabulary = logits.shape[1]
    top_k = np.array([request.sampling.top_k or vocabulary for request in requests])
    top_p = np.array([request.sampling.top_p for request in requests])
    min_p = np.array([request.sampling.min_p for request in requests])
    floor = torch.full((len(requests),), float("-inf"))
    sorting = np.flatnonzero((top_k < vocabulary) | (top_p < 1.0))
    for width in (min(CANDIDATES, vocabulary), vocabulary):
        if not len(sorting):
            break
        part = logits[sorting]
        keep = np.minimum(top_k[sorting], width)
        found, enough = _cut(part, keep, top_k[sorting] > width, top_p[sorting], width)
        # What top-k leaves must be known whole before top-p can take its share of it.
        unknown = (top_k[sorting] > width) & (top_k[sorting] < vocabulary)
        done = (enough.numpy() & ~unknown) | (width == vocabulary)
        floor[sorting[done]] = found[torch.from_numpy(done)]
        sorting = sorting[~done]
    relative = torch.from_numpy(np.log(np.maximum(min_p, 1e-38))).float()
    relative[torch.from_numpy(min_p <= 0.0)] = float("-inf")
    return torch.maximum(floor, logits.amax(dim=1) + relative)


def _cut(
    logits: torch.Tensor,
    keep: np.ndarray[tuple[int], np.dtype[np.int64]],
    beyond: np.ndarray[tuple[int], np.dtype[np.bool_]],
    top_p: np.ndarray[tuple[int], np.dtype[np.float64]],
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's lowest kept logit among its `width` likeliest, and whether these suffice.

    The first `keep` of them pass top-k; in rows where it reaches `beyond` them, all tokens count
    in top-p's total, which is right where top-k keeps all of them.
    """
    best = logits.topk(width, dim=1).values
    kept = best.masked_fill(torch.arange(width) >= torch.from_numpy(keep)[:, None], float("-inf"))
    mass = torch.where(torch.from_numpy(beyond), logits.logsumexp(dim=1), kept.logsumexp(dim=1))
    weights = (kept - mass[:, None]).exp().double()
    # A token stays while those before it have less than top_p; the likeliest always does.
    before = weights.cumsum(dim=1) - weights
    limit = torch.from_numpy(top_p)[:, None]
    stays = ((before < limit) | (limit >= 1.0)) & (kept > float("-inf"))
    stays[:, 0] = True
    count = stays.sum(dim=1)
    enough = (count < width) | ~torch.from_numpy(beyond)
    return kept.gather(1, count[:, None] - 1).squeeze(1), enough


def _reports(
    raw: torch.Tensor | None,
    rows: Sequence[int],
    drawn: Sequence[int],
    requests: Sequence[Request],
) -> list[TokenLogprob]:
    """Log probabilities of the drawn and of the likeliest tokens, for rows that asked for them."""
    if raw is None:
        return []
    chosen = raw.gather(1, torch.tensor([drawn[row] for row in rows])[:, None])[:, 0].tolist()
    counts = [min(requests[row].sampling.logprobs or 0, raw.shape[1]) for row in rows]
    widest = max(counts)
    if widest == 0:
        return [TokenLogprob(value) for value in chosen]
    values, tokens = raw.topk(widest, dim=1)
    return [
        TokenLogprob(own, tuple(zip(names[:count], likely[:count], strict=True)))
        for own, names, likely, count in zip(
            chosen, tokens.tolist(), values.tolist(), counts, strict=True
        )
    ]
