"""What a device needs to know of each row to sample it, packed for one copy.

Owns the layout of a row's parameters and of its edits to logits, and the packing of requests into
them. It never holds device memory and never imports torch. Invariant: everything that a draw
depends on besides logits and occurrences is here, by value, so a captured graph that reads the
buffer draws for whatever it holds by then; a row of zeros is not sampled at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from engine.link.tokens import LOGIT_BIAS_MAX, STOP_TOKENS_MAX
from engine.request import Request

TEMPERATURE_GREEDY = 1e-5
"""Temperatures below it are greedy: dividing by them would overflow."""
EDITS_PER_ROW_MAX = LOGIT_BIAS_MAX + STOP_TOKENS_MAX
"""Edits that a buffer has room for, on average over its rows."""
MIN_P_LEAST = 1e-38
NO_OCCURRENCES = -1
OCCURS_IN_PROMPT = 1 << 30
"""Bit of an occurrence that says that the prompt has the token; the rest counts draws."""

ROW = np.dtype(
    [
        ("seed", "<u8"),
        ("position", "<u8"),
        ("top_p", "<f8"),
        ("temperature", "<f4"),
        ("log_min_p", "<f4"),
        ("repetition", "<f4"),
        ("frequency", "<f4"),
        ("presence", "<f4"),
        ("top_k", "<i4"),
        ("occurrences", "<i4"),
        ("first_edit", "<i4"),
        ("edits", "<i4"),
        ("kind", "<i2"),
        ("likeliest", "<i2"),
    ]
)
"""A row. `top_k` 0 keeps all; `occurrences` is its place in their table or NO_OCCURRENCES;
`edits` from `first_edit` on are its own; `likeliest` tokens are reported."""
OFFSETS = {name: int(place[1]) for name, place in (ROW.fields or {}).items()}
"""Bytes before each field of a row."""
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4")])
"""What is added to a token's logit; minus infinity bans it."""


class Kind(IntEnum):
    """What a row pays for."""

    NONE = 0
    """Fills a graph's batch: nothing is read or written for it."""
    GREEDY = 1
    RANDOM = 2
    """A draw from all tokens, or from those that min-p keeps."""
    FILTERED = 3
    """A draw from what top-k or top-p keep."""


class RowBuffer:
    """Rows and edits in one run of bytes, to be copied to a device as they are.

    They lie in `memory`, zeros of `size_bytes(rows_max)`, where it is given.
    """

    def __init__(
        self,
        rows_max: int,
        edits_max: int | None = None,
        memory: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        size_bytes = self.size_bytes(rows_max, edits_max)
        self.edits_start = rows_max * ROW.itemsize
        self.bytes = np.zeros(size_bytes, dtype=np.uint8) if memory is None else memory
        assert self.bytes.size == size_bytes
        self.rows = self.bytes[: self.edits_start].view(ROW)
        self.edits = self.bytes[self.edits_start :].view(EDIT)
        self.used_bytes = self.edits_start
        """What is to be copied: behind it nothing is read."""

    @staticmethod
    def size_bytes(rows_max: int, edits_max: int | None = None) -> int:
        """Bytes of a buffer for so many rows."""
        room = rows_max * EDITS_PER_ROW_MAX if edits_max is None else edits_max
        return rows_max * ROW.itemsize + room * EDIT.itemsize

    def pack(
        self, requests: Sequence[Request], vocabulary: int, occurrences: Sequence[int] | None = None
    ) -> Kind:
        """Describe the next draw of `requests`, row by row; returns the kind that costs most.

        `occurrences` are their places in the table of occurrences; those that are penalised need
        one. Raises ValueError for more rows or edits than there is room for.
        """
        if len(requests) > len(self.rows):
            raise ValueError(f"{len(requests)} rows to sample, and room for {len(self.rows)}")
        self.rows[:] = np.zeros((), dtype=ROW)
        edits: list[tuple[int, float]] = []
        for index, request in enumerate(requests):
            own = _edits(request, vocabulary)
            place = NO_OCCURRENCES if occurrences is None else occurrences[index]
            self.rows[index] = _row(request, vocabulary, place, len(edits), len(own))
            edits += own
        if len(edits) > len(self.edits):
            raise ValueError(f"{len(edits)} edits of logits, and room for {len(self.edits)}")
        self.edits[: len(edits)] = edits
        self.used_bytes = self.edits_start + len(edits) * EDIT.itemsize
        return Kind(int(self.rows["kind"].max(initial=Kind.NONE)))


def is_penalised(request: Request) -> bool:
    """Whether what occurred changes its logits."""
    sampling = request.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def occurrences_of(request: Request, vocabulary: int) -> npt.NDArray[np.int32]:
    """A row of the table of occurrences [vocabulary], as it is before the next draw."""
    tokens = np.array(request.tokens, dtype=np.int64)
    drawn = tokens[request.prompt_tokens :]
    table = np.bincount(drawn, minlength=vocabulary).astype(np.int32)
    table[tokens[: request.prompt_tokens]] |= OCCURS_IN_PROMPT
    return table


def _edits(request: Request, vocabulary: int) -> list[tuple[int, float]]:
    """Each edited token once: a ban outweighs any bias."""
    edits = dict(request.sampling.logit_bias)
    if request.generated < request.sampling.min_tokens:
        edits |= dict.fromkeys(request.stop_token_ids, -math.inf)
    return [(token, bias) for token, bias in edits.items() if 0 <= token < vocabulary]


def _row(
    request: Request, vocabulary: int, occurrences: int, first_edit: int, edits: int
) -> tuple[float, ...]:
    sampling = request.sampling
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else 0
    kind, temperature = Kind.RANDOM, sampling.temperature
    if sampling.temperature < TEMPERATURE_GREEDY:
        kind, temperature = Kind.GREEDY, 1.0
    elif top_k or sampling.top_p < 1.0:
        kind = Kind.FILTERED
    log_min_p = math.log(max(sampling.min_p, MIN_P_LEAST)) if sampling.min_p > 0.0 else -math.inf
    return (
        sampling.seed % (1 << 64),
        len(request.tokens),
        min(sampling.top_p, 1.0),
        temperature,
        log_min_p,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        top_k,
        occurrences if is_penalised(request) else NO_OCCURRENCES,
        first_edit,
        edits,
        kind,
        min(sampling.logprobs or 0, vocabulary),
    )
