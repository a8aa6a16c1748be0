"""The last sampling launch: each row's token, its log probability, and the count of what was drawn.

Owns that kernel. Equals `engine.sampler.sample`: filters cut at exact logits, so tokens of equal
logits share one fate, and a draw is the first token at which the cumulated weight exceeds its share
of the whole. Nothing is sorted: the lowest logit to keep is searched by its bits, four at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from engine.kernels.triton.sampling_parts import (
    CANDIDATES,
    CHUNK,
    FILTERED,
    GREEDY,
    KIND,
    LOG_MIN_P,
    NONE,
    OCCURRENCES,
    POSITION,
    SEED,
    TOP_K,
    TOP_P,
    VOCABULARY_MAX,
    field,
    key_of,
    row_largest,
    uniform_number,
    value_of,
    weight_of,
)
from engine.kernels.triton.variants import Variant

TILE = 256
"""Logits of a list that are looked at at once."""
PIVOTS = tl.constexpr(16)
KEY_LEAST = tl.constexpr(-(1 << 31))
INVALID = tl.constexpr(-1)


@triton.jit
def _search(values, count, largest, needed, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The largest key at or above which tokens number `needed`, or weigh that much.

    Each round holds the values against PIVOTS keys and goes on between two of them.
    """
    low = tl.full([], KEY_LEAST, tl.int32)
    pivot = tl.arange(0, PIVOTS)
    for level in range(8):
        shift = 28 - 4 * level
        pivots = low + (pivot << shift)
        sums = tl.zeros([PIVOTS, TILE], tl.int64)
        for start in range(0, count, TILE):
            place = start + tl.arange(0, TILE)
            value = tl.load(values + place, mask=place < count, other=float("-inf"))
            own = weight_of(value, largest) if BY_WEIGHT else (place < count).to(tl.int64)
            sums += tl.where(key_of(value)[None, :] >= pivots[:, None], own[None, :], 0)
        passing = tl.sum((tl.sum(sums, axis=1) >= needed).to(tl.int32), axis=0)
        low += tl.maximum(passing - 1, 0) << shift
    return low


@triton.jit
def _weigh(values, count, largest, floor, TILE: tl.constexpr):
    """Weight and number of values above `floor`, and the weight of those that equal it."""
    above = tl.zeros([TILE], tl.int64)
    equal = tl.zeros([TILE], tl.int64)
    number = tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        value = tl.load(values + place, mask=place < count, other=float("-inf"))
        weight = tl.where(place < count, weight_of(value, largest), 0)
        above += tl.where(value > floor, weight, 0)
        equal += tl.where(value == floor, weight, 0)
        number += (value > floor).to(tl.int32)
    return tl.sum(above, axis=0), tl.sum(equal, axis=0), tl.sum(number, axis=0)


@triton.jit
def _floor_of(rows, row, values, count, largest, total, TILE: tl.constexpr):
    """The lowest logit that top-k and top-p keep; `total` is the weight of the whole row."""
    floor = tl.full([], float("-inf"), tl.float32)
    top_k = field(rows, row, TOP_K, tl.int32)
    if top_k > 0:
        floor = value_of(_search(values, count, largest, top_k.to(tl.int64), False, TILE))
        total, _, number = _weigh(values, count, largest, floor, TILE)
        # Of the tokens that share the last place, top-p counts those that fill it.
        total += (top_k - number) * weight_of(floor, largest)
    top_p = field(rows, row, TOP_P, tl.float64)
    if top_p < 1.0:
        share = top_p * total.to(tl.float64)
        needed = share.to(tl.int64)
        needed += (needed.to(tl.float64) < share).to(tl.int64)
        kept = value_of(_search(values, count, largest, needed, True, TILE))
        floor = tl.maximum(floor, kept)
    return tl.minimum(floor, largest)


@triton.jit
def _reach(values, count, largest, floor, target, TILE: tl.constexpr):
    """Place of the first value at which the weight cumulated of those kept exceeds `target`."""
    found = count
    before = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        value = tl.load(values + place, mask=place < count, other=float("-inf"))
        kept = (place < count) & (value >= floor)
        weight = tl.where(kept, weight_of(value, largest), 0)
        beyond = before + tl.cumsum(weight, axis=0) > target
        found = tl.minimum(found, tl.min(tl.where(beyond & (place < count), place, count), axis=0))
        before += tl.sum(weight, axis=0)
    return tl.minimum(found, count - 1)


@triton.jit
def _target_of(rows, row, total):
    """The draw's share of `total`, below it."""
    number = uniform_number(
        field(rows, row, SEED, tl.uint64), field(rows, row, POSITION, tl.uint64)
    )
    return tl.maximum(tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1), 0)


@triton.jit
def _draw_from_all(
    rows, row, scaled, masses, largest, vocabulary, chunks, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token of a row without top-k and top-p: its chunk by weight, and then its place."""
    each = tl.arange(0, CHUNKS)
    weights = tl.load(masses + row * chunks + each, mask=each < chunks, other=0)
    target = _target_of(rows, row, tl.sum(weights, axis=0))
    passed = (tl.cumsum(weights, axis=0) <= target) & (each < chunks)
    chunk = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), chunks - 1)
    target -= tl.sum(tl.where(each < chunk, weights, 0), axis=0)
    floor = largest + field(rows, row, LOG_MIN_P, tl.float32)
    first = chunk * CHUNK
    count = tl.minimum(vocabulary - first, CHUNK)
    values = scaled + row * vocabulary + first
    return first + _reach(values, count, largest, floor, target, TILE)


@triton.jit
def _draw_from_list(
    rows, row, scaled, masses, listed, listed_values, listed_tokens, largest, vocabulary, chunks,
    CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token of a row that filters, from its list where there is one."""
    each = tl.arange(0, CHUNKS)
    weights = tl.load(masses + row * chunks + each, mask=each < chunks, other=0)
    total = tl.sum(weights, axis=0)
    values, count = scaled + row * vocabulary, vocabulary
    length = tl.load(listed + row)
    if length >= 0:
        values, count = listed_values + row * CANDIDATES, length
    floor = _floor_of(rows, row, values, count, largest, total, TILE)
    floor = tl.maximum(floor, largest + field(rows, row, LOG_MIN_P, tl.float32))
    above, equal, _ = _weigh(values, count, largest, floor, TILE)
    token = _reach(values, count, largest, floor, _target_of(rows, row, above + equal), TILE)
    if length >= 0:
        token = tl.load(listed_tokens + row * CANDIDATES + token)
    return token


@triton.jit
def raw_logarithm(raw_peaks, raw_sums, row, chunks, CHUNKS: tl.constexpr):
    """Logarithm of the sum of a row's raw exponentials; not a number when a logit is not finite
    where it matters."""
    each = tl.arange(0, CHUNKS)
    in_row = each < chunks
    raw = tl.load(raw_peaks + row * chunks + each, mask=in_row, other=float("-inf"))
    sums = tl.load(raw_sums + row * chunks + each, mask=in_row, other=0.0)
    largest = tl.max(raw, axis=0)
    # Infinity less itself is not a number, and one that is not a number stays so in a sum.
    wrong = tl.sum(tl.where(raw != raw, raw, 0.0), axis=0) + (largest - largest)
    parts = tl.where(raw > float("-inf"), sums * tl.exp(raw - largest), 0.0)
    return largest + tl.log(tl.sum(parts, axis=0)) + wrong


@triton.jit
def sampling_finish_kernel(
    logits,
    rows,
    table,
    scaled,
    raw_peaks,
    raw_sums,
    peaks,
    best,
    masses,
    listed,
    listed_values,
    listed_tokens,
    results,
    tokens,
    logits_stride,
    vocabulary,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw each row's token.

    Shapes: as the launches before; `results` [n, 2] int32: the token, -1 for a row whose logits
    hold something that is no number, and the bits of its log probability in float32; `tokens` [n]
    int64, the same as the next step's input, 0 instead of -1; `table` counts the token where the
    row is penalised. Grid: (n,). Bytes moved: 8 n chunks, a chunk for each row that draws, and 19
    times its list for a row that filters by one of top-k and top-p, from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    kind = field(rows, row, KIND, tl.int16)
    if kind == NONE:
        return
    largest = row_largest(peaks, row, chunks, CHUNKS)
    token = tl.zeros([], tl.int32)
    if kind == GREEDY:
        each = tl.arange(0, CHUNKS)
        peak = tl.load(peaks + row * chunks + each, mask=each < chunks, other=float("-inf"))
        first = tl.min(tl.where(peak == largest, each, chunks - 1), axis=0)
        token = tl.load(best + row * chunks + first)
    elif kind == FILTERED:
        token = _draw_from_list(
            rows, row, scaled, masses, listed, listed_values, listed_tokens, largest, vocabulary,
            chunks, CHUNKS, CANDIDATES, TILE,
        )  # fmt: skip
    else:
        token = _draw_from_all(
            rows, row, scaled, masses, largest, vocabulary, chunks, CHUNK, CHUNKS, TILE
        )
    token = tl.maximum(tl.minimum(token, vocabulary - 1), 0)
    logarithm = raw_logarithm(raw_peaks, raw_sums, row, chunks, CHUNKS)
    logprob = tl.load(logits + row * logits_stride + token).to(tl.float32) - logarithm
    valid = (logarithm == logarithm) & (largest > float("-inf"))
    tl.store(results + 2 * row, tl.where(valid, token, INVALID))
    tl.store(results + 2 * row + 1, logprob.to(tl.int32, bitcast=True))
    tl.store(tokens + row, tl.where(valid, token, 0).to(tl.int64))
    place = field(rows, row, OCCURRENCES, tl.int32).to(tl.int64)
    if (place >= 0) & valid:
        entry = table + place * vocabulary + token
        tl.store(entry, tl.load(entry) + 1)


def variants() -> Iterator[Variant]:
    signature = {
        "logits": "*bf16:16",
        "rows": "*u8:16",
        "table": "*i32:16",
        **dict.fromkeys(("scaled", "raw_peaks", "raw_sums", "peaks"), "*fp32:16"),
        "best": "*i32:16",
        "masses": "*i64:16",
        "listed": "*i32:16",
        "listed_values": "*fp32:16",
        "listed_tokens": "*i32:16",
        "results": "*i32:16",
        "tokens": "*i64:16",
        **dict.fromkeys(("logits_stride", "vocabulary"), "i32:16"),
        "chunks": "i32",
    }
    constants = {
        "CHUNK": CHUNK,
        "CHUNKS": VOCABULARY_MAX // CHUNK,
        "CANDIDATES": CANDIDATES,
        "TILE": TILE,
    }
    yield Variant("256k", sampling_finish_kernel, signature, constants, num_warps=8)
