"""Causal attention of chunks of prompts over paged keys and values, their own among them.

In: `queries` [tokens, heads, dim] by strides; KV memory in `KvLayout`'s pages, the chunks' own keys
and values already there; `spans` [spans, 3] int32, (position of the first token, tokens, row of the
first token in `queries`); `tables` [spans, blocks] int32; `tiles` [tiles, 2] int32, (span, first
token in the span), as `prefill_tiles` lists them. Out: [tokens, heads * dim]; rows of no span are
not touched. Equals `engine.kernels.reference.paged_attention.attend_paged`.

Grid: one program for each tile and key head, heads first, tiles with the most keys first. The rows
of a tile's products are its tokens times the query heads of the key head. A token goes through the
keys in tiles that start at multiples of `TILE` from the sequence's beginning, and each adds to it
in the same way whether the rest of the tile is visible or not: so its result does not depend on how
the prompt was cut into chunks, nor on other spans.

Keys and values that are stored as FP8 become the queries' dtype as they are loaded; their scales
are of a head, so they are taken into the scores' scale and into the sums in the end.

Bytes moved: queries and outputs once; for each tile of queries and key head 2 * dim * item size for
each key that its last token sees. Slots that hold no visible key are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.kernels.protocol import Span
from engine.kernels.triton.attention_shapes import PrefillShape
from engine.kernels.triton.paging import PagedMemory
from engine.kernels.triton.variants import FP8_TARGETS, Variant

SIGNATURE = {
    "queries": "*bf16:16",
    "query_stride": "i32:16",
    "query_head_stride": "i32:16",
    "output": "*bf16:16",
    "output_stride": "i32:16",
    "memory": "*bf16:16",
    "keys_at": "i32:16",
    "values_at": "i32:16",
    "page_stride": "i32:16",
    "blocks_per_page": "i32",
    "tables": "*i32",
    "table_stride": "i32",
    "spans": "*i32",
    "tiles": "*i32",
    "kv_heads": "i32",
    "scales": "*fp32:16",
    "score_scale": "fp32",
}


@triton.jit
def attention_prefill_kernel(
    queries,
    query_stride,
    query_head_stride,
    output,
    output_stride,
    memory,
    keys_at,
    values_at,
    page_stride,
    blocks_per_page,
    tables,
    table_stride,
    spans,
    tiles,
    kv_heads,
    scales,
    score_scale,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    value_scale = 1.0
    if SCALED:
        score_scale *= tl.load(scales + head)
        value_scale = tl.load(scales + kv_heads + head)
    span = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start = tl.load(spans + 3 * span)
    count = tl.load(spans + 3 * span + 1)
    row_at = tl.load(spans + 3 * span + 2).to(tl.int64) + first
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    token = row // GROUP
    own_head = head * GROUP + row % GROUP
    real = (token < ROWS // GROUP) & (first + token < count)
    inside = real[:, None] & (column < DIM)[None, :]
    place = token * query_stride + own_head * query_head_stride
    queries += row_at * query_stride
    query = tl.load(queries + place[:, None] + column[None, :], mask=inside, other=0.0)
    end = start + tl.minimum(first + ROWS // GROUP, count)
    # Rows of no token look where the last one does: they would see nothing and divide by it.
    position = tl.minimum(start + first + token, end - 1)
    seen = 0
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(start + first - WINDOW + 1, 0)
        seen = oldest // TILE * TILE
    # Up to here every token of the tile sees all keys of a tile.
    clear = (start + first + 1) // TILE * TILE
    if WINDOW > 0:
        clear = seen
    memory += head * (BLOCK_TOKENS * DIM)
    table = tables + span.to(tl.int64) * table_stride
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, COLUMNS], tl.float32)
    if WINDOW == 0:
        peak, weight, values = _attend(
            peak, weight, values, query, position, oldest, seen, clear, memory, keys_at, values_at,
            page_stride, blocks_per_page, table, kv_heads, score_scale,
            DIM, COLUMNS, BLOCK_TOKENS, TILE, WINDOW, False, WIDEN,
        )  # fmt: skip
    peak, weight, values = _attend(
        peak, weight, values, query, position, oldest, clear, end, memory, keys_at, values_at,
        page_stride, blocks_per_page, table, kv_heads, score_scale,
        DIM, COLUMNS, BLOCK_TOKENS, TILE, WINDOW, True, WIDEN,
    )  # fmt: skip
    place = token * output_stride + own_head * DIM
    output += row_at * output_stride
    values *= (value_scale / weight)[:, None]
    tl.store(output + place[:, None] + column[None, :], values, mask=inside)


@triton.jit
def _attend(
    peak,
    weight,
    total,
    query,
    position,
    oldest,
    begin,
    end,
    memory,
    keys_at,
    values_at,
    page_stride,
    blocks_per_page,
    table,
    kv_heads,
    score_scale,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Go on through the keys from `begin`, a multiple of TILE, to `end`. Those before `oldest` may
    be in blocks of others by now, and are not read."""
    column = tl.arange(0, COLUMNS)
    # The table is read a tile ahead, or keys would wait for two reads in a row.
    token = begin + tl.arange(0, TILE)
    block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        shown = (column < DIM)[None, :]
        if MASKED:
            shown = shown & (token < end)[:, None]
        if WINDOW > 0:
            shown = shown & (token >= oldest)[:, None]
        cell = (block // blocks_per_page).to(tl.int64) * page_stride
        cell += (block % blocks_per_page) * (kv_heads * BLOCK_TOKENS * DIM)
        cell += token % BLOCK_TOKENS * DIM
        ahead = token + TILE
        block = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < end, other=0)
        cell = cell[:, None] + column[None, :]
        keys = tl.load(memory + keys_at + cell, mask=shown, other=0.0).to(query.dtype)
        if WIDEN:
            scores = tl.dot(query.to(tl.float32), tl.trans(keys.to(tl.float32)))
        else:
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if MASKED:
            visible = token[None, :] <= position[:, None]
            if WINDOW > 0:
                visible = visible & (token[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        base = higher
        if WINDOW > 0:
            # A token may not see any key of the tiles that an earlier one begins with.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        # In this order nothing can be contracted, so masked tiles are computed as others are.
        shrunk = tl.exp2((peak - base) * score_scale)
        part = tl.exp2((scores - base[:, None]) * score_scale)
        weight = weight * shrunk + tl.sum(part, axis=1)
        values = tl.load(memory + values_at + cell, mask=shown, other=0.0).to(query.dtype)
        part = part.to(query.dtype)
        total = total * shrunk[:, None]
        if WIDEN:
            total += tl.dot(part.to(tl.float32), values.to(tl.float32))
        else:
            total = tl.dot(part, values, total, input_precision="ieee")
        peak = higher
    return peak, weight, total


def prefill_tiles(spans: Sequence[Span], shape: PrefillShape) -> npt.NDArray[np.int32]:
    """[tiles, 2], (span, first token) of all tiles, those that take longest first."""
    found = [
        (span.start + first, index, first)
        for index, span in enumerate(spans)
        for first in range(0, span.count, shape.tokens)
    ]
    found.sort(key=lambda tile: -tile[0])
    return np.array([tile[1:] for tile in found], dtype=np.int32).reshape(-1, 2)


def prefill_spans(spans: Sequence[Span], first_row: int) -> npt.NDArray[np.int32]:
    """[spans, 3], (position, tokens, row) of spans whose tokens begin at row `first_row`."""
    counts = np.array([span.count for span in spans], dtype=np.int32)
    starts = np.array([span.start for span in spans], dtype=np.int32)
    rows = (first_row + np.cumsum(counts) - counts).astype(np.int32)
    return np.stack((starts, counts, rows), axis=1)


def attention_prefill(
    queries: torch.Tensor,
    output: torch.Tensor,
    memory: PagedMemory,
    layer: int,
    tables: torch.Tensor,
    spans: torch.Tensor,
    tiles: torch.Tensor,
    shape: PrefillShape,
    *,
    scales: torch.Tensor | None = None,
) -> None:
    """Write the spans' rows of `output` [tokens, heads * dim].

    `scales` [K and V, kv_heads] are of the layer's keys and values where these are stored as FP8.
    """
    assert queries.stride(2) == 1
    assert output.stride(1) == 1
    attention_prefill_kernel[(len(tiles) * shape.kv_heads,)](
        queries,
        queries.stride(0),
        queries.stride(1),
        output,
        output.stride(0),
        memory.flat,
        memory.keys_at(layer),
        memory.values_at(layer),
        memory.page_stride,
        memory.layout.blocks_per_page,
        tables,
        tables.stride(0),
        spans,
        tiles,
        shape.kv_heads,
        spans if scales is None else scales,
        shape.head_dim**-0.5 / math.log(2),
        SCALED=scales is not None,
        **shape.constexprs(),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        maxnreg=shape.registers_max,
    )


def variants() -> Iterator[Variant]:
    for name, heads, kv_heads, dim, window in (
        ("bf16 dim 64 group 4", 32, 8, 64, 0),
        ("bf16 dim 128 group 4", 32, 8, 128, 0),
        ("bf16 dim 128 group 4 window 4096", 32, 8, 128, 4096),
        ("bf16 dim 128 group 7", 28, 4, 128, 0),
        ("bf16 dim 80 group 1", 32, 32, 80, 0),
        ("bf16 dim 256 group 8", 8, 1, 256, 0),
    ):
        shape = replace(PrefillShape.choose(heads, kv_heads, dim, 32), window_tokens=window)
        yield Variant(
            name,
            attention_prefill_kernel,
            SIGNATURE,
            {**shape.constexprs(), "SCALED": False, "WIDEN": False},
            shape.num_warps,
            shape.num_stages,
            shape.registers_max,
        )
    for name, heads, kv_heads, dim in (
        ("fp8 dim 64 group 4", 32, 8, 64),
        ("fp8 dim 128 group 4", 32, 8, 128),
        ("fp8 dim 256 group 8", 8, 1, 256),
    ):
        shape = PrefillShape.choose(heads, kv_heads, dim, 32)
        yield Variant(
            name,
            attention_prefill_kernel,
            {**SIGNATURE, "memory": "*fp8e4nv:16"},
            {**shape.constexprs(), "SCALED": True, "WIDEN": False},
            shape.num_warps,
            shape.num_stages,
            shape.registers_max,
            targets=FP8_TARGETS,
        )
