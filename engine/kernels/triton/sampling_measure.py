"""The second sampling launch, for rows that draw: how much weight lies in each chunk, and where.

Owns that kernel. Without it a row would have to be summed by one program.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from engine.kernels.triton.sampling_parts import (
    CHUNK,
    FILTERED,
    KIND,
    LADDER,
    LOG_MIN_P,
    RANDOM,
    VOCABULARY_MAX,
    field,
    ladder_values,
    row_largest,
    weight_of,
)
from engine.kernels.triton.variants import Variant

TILE = 128
"""Logits that are held against all steps of the ladder at once."""


@triton.jit
def sampling_measure_kernel(
    rows,
    scaled,
    peaks,
    masses,
    step_counts,
    step_masses,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LADDER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weights of chunks, and of their tokens above each step of the ladder.

    Shapes: `scaled` [n, vocabulary], `peaks` [n, chunks], `masses` [n, chunks] int64: the weight of
    all tokens in a row that filters, else of those that min-p keeps; for rows that filter,
    `step_counts` [n, chunks, LADDER] int32 and `step_masses` the same in float32, in units of the
    largest weight. Grid: (chunks, n). Bytes moved: 4 n vocabulary.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kind = field(rows, row, KIND, tl.int16)
    if kind < RANDOM:
        return
    largest = row_largest(peaks, row, chunks, CHUNKS)
    source = scaled + row * vocabulary
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(source + token, mask=token < vocabulary, other=float("-inf"))
    weight = weight_of(value, largest)
    if kind == FILTERED:
        steps = ladder_values(largest, LADDER)
        counts = tl.zeros([LADDER, TILE], tl.int32)
        sums = tl.zeros([LADDER, TILE], tl.float32)
        for start in range(0, CHUNK, TILE):
            own = chunk * CHUNK + start + tl.arange(0, TILE)
            part = tl.load(source + own, mask=own < vocabulary, other=float("-inf"))
            above = part[None, :] >= steps[:, None]
            counts += above.to(tl.int32)
            sums += tl.where(above, tl.exp(part - largest)[None, :], 0.0)
        place = (row * chunks + chunk) * LADDER + tl.arange(0, LADDER)
        tl.store(step_counts + place, tl.sum(counts, axis=1))
        tl.store(step_masses + place, tl.sum(sums, axis=1))
    else:
        floor = largest + field(rows, row, LOG_MIN_P, tl.float32)
        weight = tl.where(value >= floor, weight, 0)
    tl.store(masses + row * chunks + chunk, tl.sum(weight, axis=0))


def variants() -> Iterator[Variant]:
    signature = {
        "rows": "*u8:16",
        "scaled": "*fp32:16",
        "peaks": "*fp32:16",
        "masses": "*i64:16",
        "step_counts": "*i32:16",
        "step_masses": "*fp32:16",
        "vocabulary": "i32:16",
        "chunks": "i32",
    }
    constants = {
        "CHUNK": CHUNK,
        "CHUNKS": VOCABULARY_MAX // CHUNK,
        "LADDER": LADDER,
        "TILE": TILE,
    }
    yield Variant("256k", sampling_measure_kernel, signature, constants)
