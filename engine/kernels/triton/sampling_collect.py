"""The third sampling launch, for rows that filter: a short list that holds all that may be kept.

Owns that kernel. The list is the tokens above the highest step of the ladder below which nothing
can be kept; it is in the order of tokens, since a draw goes through them in that order.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from engine.kernels.triton.sampling_parts import (
    CANDIDATES,
    CHUNK,
    FILTERED,
    KIND,
    LADDER,
    TOP_K,
    TOP_P,
    VOCABULARY_MAX,
    WEIGHT_ONE,
    field,
    ladder_values,
    row_largest,
)
from engine.kernels.triton.variants import Variant

MASS_MARGIN = tl.constexpr(1.0001)
"""Sums in float32 are off by a millionth: a list this much heavier than needed is surely enough."""


@triton.jit
def sampling_collect_kernel(
    rows,
    scaled,
    peaks,
    masses,
    step_counts,
    step_masses,
    listed,
    values,
    tokens,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LADDER: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Tokens that top-k or top-p may keep, and their scaled logits.

    Shapes: as `sampling_measure_kernel`; `listed` [n] int32: the list's length, or -1 for a row
    that no list of CANDIDATES can do for; `values` [n, CANDIDATES] float32 and `tokens` int32.
    Grid: (chunks, n). Bytes moved: 4 n vocabulary, and 8 chunks LADDER a program from the cache.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if field(rows, row, KIND, tl.int16) < FILTERED:
        return
    each = tl.arange(0, CHUNKS)
    step = tl.arange(0, LADDER)
    place = (row * chunks + each[:, None]) * LADDER + step[None, :]
    in_row = (each < chunks)[:, None]
    chunk_counts = tl.load(step_counts + place, mask=in_row, other=0)
    counts = tl.sum(chunk_counts, axis=0)
    sums = tl.sum(tl.load(step_masses + place, mask=in_row, other=0.0), axis=0)
    weights = tl.load(masses + row * chunks + each, mask=each < chunks, other=0)
    total = tl.sum(weights, axis=0).to(tl.float32) / WEIGHT_ONE

    top_k = field(rows, row, TOP_K, tl.int32)
    top_p = field(rows, row, TOP_P, tl.float64).to(tl.float32)
    # Top-p looks at what top-k left: enough for that one is enough for both.
    enough = tl.where(top_k > 0, counts >= top_k, sums >= top_p * total * MASS_MARGIN)
    chosen = tl.min(tl.where(enough, step, LADDER), axis=0)
    count = tl.sum(tl.where(step == chosen, counts, 0), axis=0)
    if (chosen == LADDER) | (count > CANDIDATES):
        tl.store(listed + row, -1, mask=chunk == 0)
        return
    tl.store(listed + row, count, mask=chunk == 0)

    before = (each < chunk)[:, None] & (step == chosen)[None, :]
    first = tl.sum(tl.sum(tl.where(before, chunk_counts, 0), axis=1), axis=0)
    steps = ladder_values(row_largest(peaks, row, chunks, CHUNKS), LADDER)
    # The step's own bits, as they were when it was counted: nothing is computed with them.
    edge = tl.min(tl.where(step == chosen, steps, float("inf")), axis=0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(scaled + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    above = (value >= edge) & (token < vocabulary)
    rank = row * CANDIDATES + first + tl.cumsum(above.to(tl.int32), axis=0) - 1
    tl.store(values + rank, value, mask=above)
    tl.store(tokens + rank, token, mask=above)


def variants() -> Iterator[Variant]:
    signature = {
        "rows": "*u8:16",
        "scaled": "*fp32:16",
        "peaks": "*fp32:16",
        "masses": "*i64:16",
        "step_counts": "*i32:16",
        "step_masses": "*fp32:16",
        "listed": "*i32:16",
        "values": "*fp32:16",
        "tokens": "*i32:16",
        "vocabulary": "i32:16",
        "chunks": "i32",
    }
    constants = {
        "CHUNK": CHUNK,
        "CHUNKS": VOCABULARY_MAX // CHUNK,
        "LADDER": LADDER,
        "CANDIDATES": CANDIDATES,
    }
    yield Variant("256k", sampling_collect_kernel, signature, constants)
