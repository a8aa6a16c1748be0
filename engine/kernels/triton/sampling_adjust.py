"""The first sampling launch: logits become what is drawn from, and each chunk's facts are kept.

Owns that kernel. Equals `engine.penalties.adjust` and the division by the temperature in
`engine.sampler`, operation by operation and rounding by rounding, which is why it is compiled
without contraction to fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from engine.kernels.triton.sampling_parts import (
    CHUNK,
    COUNT_MASK,
    EDITS,
    FIRST_EDIT,
    FREQUENCY,
    KIND,
    NONE,
    OCCURRENCES,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    field,
)
from engine.kernels.triton.variants import Variant

EDITS_AT_ONCE = 64


@triton.jit
def _adjusted(rows, row, value, occurrence, vocabulary, table, place, inside):
    """Penalties by what occurred, and the temperature: [places]."""
    if occurrence >= 0:
        # 64 bits: a table of many rows has more entries than 32 can count.
        entry = tl.load(table + occurrence.to(tl.int64) * vocabulary + place, mask=inside, other=0)
        repetition = field(rows, row, REPETITION, tl.float32)
        count = (entry & COUNT_MASK).to(tl.float32)
        changed = tl.where(value > 0, tl.math.div_rn(value, repetition), value * repetition)
        changed -= field(rows, row, FREQUENCY, tl.float32) * count
        changed -= field(rows, row, PRESENCE, tl.float32) * (count > 0).to(tl.float32)
        value = tl.where(entry != 0, changed, value)
    return tl.math.div_rn(value, field(rows, row, TEMPERATURE, tl.float32))


@triton.jit
def sampling_adjust_kernel(
    logits,
    rows,
    edits,
    table,
    scaled,
    raw_peaks,
    raw_sums,
    peaks,
    best,
    logits_stride,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    EDITS_AT_ONCE: tl.constexpr,
):
    """scaled = (penalised(logits + bias)) / temperature, and what finds its largest.

    Shapes: `logits` [n, vocabulary] of any float; `rows` [n] of `sampling_rows.ROW` as bytes;
    `edits` [edits] of `EDIT` as int32 pairs; `table` [places, vocabulary] int32 of occurrences;
    `scaled` [n, vocabulary] float32; by chunk, [n, chunks]: the largest raw logit (not a number
    where the chunk has one), the sum of exponentials of raw logits less it, the largest scaled
    logit, and the first token that has it. Grid: (chunks, n). Bytes moved: 2 n vocabulary in, 4 n
    vocabulary out, and 4 vocabulary more for each penalised row.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if field(rows, row, KIND, tl.int16) == NONE:
        return
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocabulary
    source, target = logits + row * logits_stride, scaled + row * vocabulary
    raw = tl.load(source + token, mask=inside, other=float("-inf")).to(tl.float32)
    occurrence = field(rows, row, OCCURRENCES, tl.int32)
    value = _adjusted(rows, row, raw, occurrence, vocabulary, table, token, inside)
    tl.store(target + token, value, mask=inside)

    count, first = field(rows, row, EDITS, tl.int32), field(rows, row, FIRST_EDIT, tl.int32)
    if count > 0:
        # Few tokens are edited: each overwrites what was stored for it as if there were no bias.
        tl.debug_barrier()
        for start in range(0, count, EDITS_AT_ONCE):
            edit = start + tl.arange(0, EDITS_AT_ONCE)
            listed = edit < count
            place = edits + 2 * (first + edit)
            edited = tl.load(place, mask=listed, other=-1)
            own = listed & (edited >= chunk * CHUNK) & (edited < (chunk + 1) * CHUNK)
            bias = tl.load(place + 1, mask=listed, other=0).to(tl.float32, bitcast=True)
            biased = tl.load(source + edited, mask=own, other=0.0).to(tl.float32) + bias
            changed = _adjusted(rows, row, biased, occurrence, vocabulary, table, edited, own)
            tl.store(target + edited, changed, mask=own)
        tl.debug_barrier()
        value = tl.load(target + token, mask=inside, other=float("-inf"))

    place = row * chunks + chunk
    largest = tl.max(raw, axis=0)
    origin = tl.where(largest > float("-inf"), largest, 0.0)
    tl.store(raw_sums + place, tl.sum(tl.exp(raw - origin), axis=0))
    tl.store(raw_peaks + place, largest + tl.sum(tl.where(raw != raw, raw, 0.0), axis=0))
    peak, index = tl.max(value, axis=0, return_indices=True)
    tl.store(peaks + place, peak)
    tl.store(best + place, chunk * CHUNK + index)


def variants() -> Iterator[Variant]:
    signature = {
        "logits": "*bf16:16",
        "rows": "*u8:16",
        "edits": "*i32:16",
        "table": "*i32:16",
        "scaled": "*fp32:16",
        **dict.fromkeys(("raw_peaks", "raw_sums", "peaks"), "*fp32:16"),
        "best": "*i32:16",
        **dict.fromkeys(("logits_stride", "vocabulary"), "i32:16"),
        "chunks": "i32",
    }
    constants = {"CHUNK": CHUNK, "EDITS_AT_ONCE": EDITS_AT_ONCE}
    yield Variant("bf16", sampling_adjust_kernel, signature, constants, fuses=False)
