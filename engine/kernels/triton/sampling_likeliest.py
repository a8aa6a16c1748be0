"""The likeliest tokens of rows that report them, with their log probabilities.

Owns two kernels: each chunk's likeliest, and of these the row's. Equals the report of
`engine.sampler`, of raw logits; among equals the first token comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from engine.kernels.triton.sampling_finish import raw_logarithm
from engine.kernels.triton.sampling_parts import (
    CHUNK,
    LIKELIEST,
    VOCABULARY_MAX,
    field,
)
from engine.kernels.triton.variants import Variant
from engine.link.tokens import LOGPROBS_MAX

PADDED = triton.next_power_of_2(LOGPROBS_MAX)


@triton.jit
def likeliest_of_chunks_kernel(
    logits,
    rows,
    found,
    logits_stride,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    LIKELIEST_MAX: tl.constexpr,
):
    """The largest logits of each chunk, as many as its row reports, largest first.

    Shapes: `logits` [n, vocabulary]; `found` [n, chunks, LIKELIEST_MAX, 2] int32: the token, -1
    where the chunk has no more, and the bits of its logit in float32. Grid: (chunks, n). Bytes
    moved: 2 vocabulary for each row that reports.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = field(rows, row, LIKELIEST, tl.int16).to(tl.int32)
    if count == 0:
        return
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocabulary
    value = tl.load(logits + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside & (value == value), value, float("-inf"))
    left = inside
    place = found + (row * chunks + chunk) * (2 * LIKELIEST_MAX)
    for rank in range(count):
        largest = tl.max(tl.where(left, value, float("-inf")), axis=0)
        best = tl.min(tl.where(left & (value == largest), token, vocabulary), axis=0)
        tl.store(place + 2 * rank, tl.where(best < vocabulary, best, -1))
        tl.store(place + 2 * rank + 1, largest.to(tl.int32, bitcast=True))
        left = left & (token != best)


@triton.jit
def likeliest_of_rows_kernel(
    rows,
    found,
    raw_peaks,
    raw_sums,
    likeliest,
    chunks,
    CHUNKS: tl.constexpr,
    LIKELIEST_MAX: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The largest of the chunks' largest, as log probabilities.

    Shapes: `found` [n, chunks, LIKELIEST_MAX, 2], `likeliest` [n, LIKELIEST_MAX, 2] int32: tokens
    and bits of float32. Grid: (n,). Bytes moved: 8 chunks LIKELIEST_MAX for each row that reports.
    """
    row = tl.program_id(0).to(tl.int64)
    count = field(rows, row, LIKELIEST, tl.int16).to(tl.int32)
    if count == 0:
        return
    chunk, rank = tl.arange(0, CHUNKS)[:, None], tl.arange(0, PADDED)[None, :]
    inside = (chunk < chunks) & (rank < count)
    place = found + ((row * chunks + chunk) * LIKELIEST_MAX + rank) * 2
    tokens = tl.load(place, mask=inside, other=-1)
    bits = tl.load(place + 1, mask=inside, other=0)
    left = inside & (tokens >= 0)
    values = tl.where(left, bits.to(tl.float32, bitcast=True), float("-inf"))
    logarithm = raw_logarithm(raw_peaks, raw_sums, row, chunks, CHUNKS)
    for order in range(count):
        largest = tl.max(tl.max(tl.where(left, values, float("-inf")), axis=1), axis=0)
        same = tl.where(left & (values == largest), tokens, 0x7FFFFFFF)
        best = tl.min(tl.min(same, axis=1), axis=0)
        target = likeliest + (row * LIKELIEST_MAX + order) * 2
        tl.store(target, best)
        tl.store(target + 1, (largest - logarithm).to(tl.int32, bitcast=True))
        left = left & (tokens != best)


def variants() -> Iterator[Variant]:
    chunks = VOCABULARY_MAX // CHUNK
    yield Variant(
        "bf16",
        likeliest_of_chunks_kernel,
        {
            "logits": "*bf16:16",
            "rows": "*u8:16",
            "found": "*i32:16",
            **dict.fromkeys(("logits_stride", "vocabulary"), "i32:16"),
            "chunks": "i32",
        },
        {"CHUNK": CHUNK, "LIKELIEST_MAX": LOGPROBS_MAX},
    )
    yield Variant(
        "256k",
        likeliest_of_rows_kernel,
        {
            "rows": "*u8:16",
            "found": "*i32:16",
            **dict.fromkeys(("raw_peaks", "raw_sums"), "*fp32:16"),
            "likeliest": "*i32:16",
            "chunks": "i32",
        },
        {"CHUNKS": chunks, "LIKELIEST_MAX": LOGPROBS_MAX, "PADDED": PADDED},
        num_warps=8,
    )
