"""Attention of one query for each sequence over paged keys and values.

In: `queries` [sequences, heads, dim] by strides; KV memory in `KvLayout`'s pages; `tables`
[sequences, blocks] int32; `lengths` [sequences] int32, keys that each query sees, its own included;
the work list of `attention_work`. Out: [sequences, heads * dim], zero for a sequence without keys.
Equals `engine.kernels.reference.paged_attention.attend_paged`.

Grid: as many programs as run on the device at once, whatever the batch; program p takes pairs
(item, key head) p, p + programs and so on, heads first, for heads of a block lie side by side. The
query heads of a key head are rows of one product, at least 16. An item that is its sequence's only
one writes its output. Of several, each leaves its sums in `sums` and `peaks` (float32), and the one
that comes last, by the counter in `arrived`, folds all of them in ascending order. So what is added
to what, and in which order, follows from the sequence's own length alone. Counters are zero between
launches: make them zero once.

Keys and values that are stored as FP8 become the queries' dtype as they are loaded; their scales
are of a head, so they are taken into the scores' scale and into the sums in the end.

Bytes moved: 2 * dim * item size for each visible key and key head, the queries and outputs; of a
sequence with several items also 2 * 4 * (dim + 2) for each item and query head, about 3 % of the
keys and values at 256 tokens, 128 dimensions and groups of 4. Slots that hold no visible key are
not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engine.kernels.triton.attention_shapes import REGISTERS_MAX, DecodeShape
from engine.kernels.triton.paging import PagedMemory
from engine.kernels.triton.variants import FP8_TARGETS, Variant
from engine.workspace import Workspace

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
    "tables": "*i32:16",
    "table_stride": "i32",
    "lengths": "*i32:16",
    "items": "*i32:16",
    "firsts": "*i32:16",
    "sums": "*fp32:16",
    "peaks": "*fp32:16",
    "arrived": "*i32:16",
    "sequences": "i32",
    "kv_heads": "i32",
    "scales": "*fp32:16",
    "score_scale": "fp32",
}


@triton.jit
def attention_decode_kernel(
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
    lengths,
    items,
    firsts,
    sums,
    peaks,
    arrived,
    sequences,
    kv_heads,
    scales,
    score_scale,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < GROUP)[:, None] & (column < DIM)[None, :]
    total = tl.load(firsts + sequences) * kv_heads
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        item = work // kv_heads
        head = work % kv_heads
        own_score_scale, value_scale = score_scale, 1.0
        if SCALED:
            own_score_scale *= tl.load(scales + head)
            value_scale = tl.load(scales + kv_heads + head)
        sequence = tl.load(items + 2 * item).to(tl.int64)
        split = tl.load(items + 2 * item + 1)
        length = tl.load(lengths + sequence)
        end = tl.minimum((split + 1) * SPLIT, length)
        seen = 0
        if WINDOW > 0:
            seen = tl.maximum(length - WINDOW, 0)
        # A tile without a visible key would have no largest score.
        begin = tl.maximum(split * SPLIT, seen // TILE * TILE)
        own = (head * GROUP + row)[:, None] * query_head_stride + column[None, :]
        query = tl.load(queries + sequence * query_stride + own, mask=inside, other=0.0)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        total_values = tl.zeros([ROWS, COLUMNS], tl.float32)
        # The table is read a tile ahead, or keys would wait for two reads in a row. A tile within
        # one block reads one entry, and its rows lie at offsets that never change.
        table = tables + sequence * table_stride
        token = begin if TILE <= BLOCK_TOKENS else begin + tl.arange(0, TILE)
        block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0)
        for first in range(begin, end, TILE):
            token = first + tl.arange(0, TILE)
            visible = (token < end) & (token >= seen)
            shown = visible[:, None] & (column < DIM)[None, :]
            cell = (token % BLOCK_TOKENS)[:, None] * DIM + column[None, :]
            head_row = (block % blocks_per_page) * kv_heads + head
            start = (block // blocks_per_page).to(tl.int64) * page_stride
            start += head_row * (BLOCK_TOKENS * DIM)
            token = first + TILE if TILE <= BLOCK_TOKENS else token + TILE
            block = tl.load(table + token // BLOCK_TOKENS, mask=token < end, other=0)
            start = start if TILE <= BLOCK_TOKENS else start[:, None]
            keys = tl.load(memory + keys_at + start + cell, mask=shown, other=0.0).to(query.dtype)
            if WIDEN:
                scores = tl.dot(query.to(tl.float32), tl.trans(keys.to(tl.float32)))
            else:
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
            scores = tl.where(visible[None, :], scores * own_score_scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            shrunk = tl.exp2(peak - higher)
            part = tl.exp2(scores - higher[:, None])
            weight = weight * shrunk + tl.sum(part, axis=1)
            values = tl.load(memory + values_at + start + cell, mask=shown, other=0.0)
            values = values.to(query.dtype)
            part = part.to(query.dtype)
            total_values = total_values * shrunk[:, None]
            if WIDEN:
                total_values += tl.dot(part.to(tl.float32), values.to(tl.float32))
            else:
                total_values = tl.dot(part, values, total_values, input_precision="ieee")
            peak = higher
        head_at = (head * GROUP + row)[:, None] * DIM + column[None, :]
        target = output + sequence * output_stride + head_at
        mine = tl.load(firsts + sequence)
        count = tl.load(firsts + sequence + 1) - mine
        if count == 1:
            # Only a sequence without keys has no weight.
            scale = value_scale / tl.where(weight == 0.0, 1.0, weight)
            tl.store(target, total_values * scale[:, None], mask=inside)
        else:
            place = (item * kv_heads + head).to(tl.int64) * GROUP + row
            tl.store(sums + place[:, None] * DIM + column[None, :], total_values, mask=inside)
            tl.store(peaks + 2 * place, peak, mask=row < GROUP)
            tl.store(peaks + 2 * place + 1, weight, mask=row < GROUP)
            # All threads' sums are written before the one that counts lets others see them.
            tl.debug_barrier()
            before = tl.atomic_add(arrived + sequence * kv_heads + head, 1, sem="acq_rel")
            if before == count - 1:
                tl.store(arrived + sequence * kv_heads + head, 0)
                folded, weight = _fold(
                    sums, peaks, mine, count, head, kv_heads, GROUP, ROWS, DIM, COLUMNS, FOLDED
                )
                tl.store(target, folded * (value_scale / weight)[:, None], mask=inside)


@triton.jit
def _fold(
    sums,
    peaks,
    first,
    count,
    head,
    kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Values and weights of items `first` to `first + count`, in that order."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < GROUP)[:, None] & (column < DIM)[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total_values = tl.zeros([ROWS, COLUMNS], tl.float32)
    for item in tl.range(0, count, num_stages=FOLDED):
        place = ((first + item) * kv_heads + head).to(tl.int64) * GROUP + row
        other = tl.load(
            peaks + 2 * place, mask=row < GROUP, other=float("-inf"), cache_modifier=".cg"
        )
        other_weight = tl.load(
            peaks + 2 * place + 1, mask=row < GROUP, other=0.0, cache_modifier=".cg"
        )
        values = tl.load(
            sums + place[:, None] * DIM + column[None, :],
            mask=inside,
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(peak, other)
        # Rows beyond the group have no peak at all.
        higher = tl.where(row < GROUP, higher, 0.0)
        shrunk, other_shrunk = tl.exp2(peak - higher), tl.exp2(other - higher)
        weight = weight * shrunk + other_weight * other_shrunk
        total_values = total_values * shrunk[:, None] + values * other_shrunk[:, None]
        peak = higher
    return total_values, tl.where(weight == 0.0, 1.0, weight)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What splits of one sequence leave for each other; all layers of a step use the same."""

    sums: torch.Tensor
    peaks: torch.Tensor
    arrived: torch.Tensor
    """Zero before and after each launch."""

    @classmethod
    def make(
        cls,
        shape: DecodeShape,
        items: int,
        sequences: int,
        device: torch.device,
        workspace: Workspace | None = None,
    ) -> Scratch:
        """Room for a work list of `items` of at most `sequences`, in `workspace` if it is given."""
        rows = items * shape.heads
        lend = (workspace or Workspace()).lend
        whole, number = torch.int32, torch.float32
        return cls(
            sums=lend("attention: sums", rows, shape.head_dim, dtype=number, device=device),
            peaks=lend("attention: peaks", rows, 2, dtype=number, device=device),
            arrived=torch.zeros((sequences, shape.kv_heads), dtype=whole, device=device),
        )


def attention_decode(
    queries: torch.Tensor,
    output: torch.Tensor,
    memory: PagedMemory,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    items: torch.Tensor,
    firsts: torch.Tensor,
    scratch: Scratch,
    shape: DecodeShape,
    *,
    programs: int,
    scales: torch.Tensor | None = None,
) -> None:
    """Write `output` [sequences, heads * dim], with `programs` programs.

    `scales` [K and V, kv_heads] are of the layer's keys and values where these are stored as FP8.
    """
    assert queries.stride(2) == 1
    assert output.stride(1) == 1
    attention_decode_kernel[(programs,)](
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
        lengths,
        items,
        firsts,
        scratch.sums,
        scratch.peaks,
        scratch.arrived,
        len(lengths),
        shape.kv_heads,
        scratch.peaks if scales is None else scales,
        shape.head_dim**-0.5 / math.log(2),
        SCALED=scales is not None,
        **shape.constexprs(),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        maxnreg=REGISTERS_MAX,
    )


def variants() -> Iterator[Variant]:
    for name, heads, kv_heads, dim, window in (
        ("bf16 dim 64 group 4", 32, 8, 64, 0),
        ("bf16 dim 128 group 1", 32, 32, 128, 0),
        ("bf16 dim 128 group 4", 32, 8, 128, 0),
        ("bf16 dim 128 group 4 window 4096", 32, 8, 128, 4096),
        ("bf16 dim 128 group 7", 28, 4, 128, 0),
        ("bf16 dim 128 group 8", 64, 8, 128, 0),
        ("bf16 dim 80 group 1", 32, 32, 80, 0),
        ("bf16 dim 256 group 8", 8, 1, 256, 0),
    ):
        shape = replace(DecodeShape.choose(heads, kv_heads, dim, 32), window_tokens=window)
        constexprs = {**shape.constexprs(), "SCALED": False, "WIDEN": False}
        yield Variant(
            name,
            attention_decode_kernel,
            SIGNATURE,
            constexprs,
            shape.num_warps,
            shape.num_stages,
            REGISTERS_MAX,
        )
    for name, heads, kv_heads, dim in (
        ("fp8 dim 64 group 4", 32, 8, 64),
        ("fp8 dim 128 group 4", 32, 8, 128),
        ("fp8 dim 256 group 8", 8, 1, 256),
    ):
        shape = DecodeShape.choose(heads, kv_heads, dim, 32)
        yield Variant(
            name,
            attention_decode_kernel,
            {**SIGNATURE, "memory": "*fp8e4nv:16"},
            {**shape.constexprs(), "SCALED": True, "WIDEN": False},
            shape.num_warps,
            shape.num_stages,
            REGISTERS_MAX,
            targets=FP8_TARGETS,
        )
