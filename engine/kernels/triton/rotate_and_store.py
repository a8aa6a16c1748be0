"""Norms of query and key heads, rotation, and the write of keys and values into their pages.

Owns that kernel and its launch: three to five launches of other engines in one. Equals
`engine.kernels.reference.kernels.ReferenceKernels.rotate_and_store`. It writes the cells of the
step's tokens and no other byte of KV memory: what lies in unused slots stays as it is, and a token
without a cell, as those have that fill a graph's batch, writes nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.kv_scales import FP8_MAX
from engine.kernels.protocol import NormWeights
from engine.kernels.triton.variants import FP8_TARGETS, Variant
from engine.kv_layout import KvLayout

HEADS_PER_PROGRAM = 8
FP8_LARGEST = tl.constexpr(FP8_MAX)
NO_CELL = -1
"""The cell of a token whose keys and values are not stored."""


@triton.jit
def _head_place(head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, side, tile):
    """Offset of key and value heads from their layer's and block's start."""
    stored = head - HEADS
    value = stored >= KV_HEADS
    return tl.where(value, side + (stored - KV_HEADS) * tile, stored * tile)


@triton.jit
def _weight_of(is_query, query_weight, key_weight, place, inside):
    """The norm's weights of each head: [heads, places]."""
    of_query = tl.load(query_weight + place, mask=inside, other=0.0)
    of_key = tl.load(key_weight + place, mask=inside, other=0.0)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


@triton.jit
def _normed(part, scale, weight):
    """One part of normalised heads, rounded as the reference does: [heads, part]."""
    scaled = (part.to(tl.float32) * scale[:, None]).to(part.dtype).to(tl.float32)
    return (scaled * weight.to(tl.float32)).to(part.dtype)


@triton.jit
def _fitting(numbers, scale):
    """What FP8 can hold of numbers over their scale; anything else is no number."""
    scaled = numbers.to(tl.float32) / scale
    return tl.where(tl.abs(scaled) <= FP8_LARGEST, scaled, float("nan"))


@triton.jit
def rotate_and_store_kernel(
    qkv,
    query_weight,
    key_weight,
    angles,
    cells,
    memory,
    scales,
    qkv_stride,
    angles_stride,
    layer_start,
    side,
    page_elements,
    epsilon,
    SCALED: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS_PER_PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Queries are turned in place; keys and values go to `memory`.

    Shapes: `qkv` [tokens, (HEADS + 2 KV_HEADS) * HEAD_DIM]; norm weights [HEAD_DIM]; `angles`
    [tokens, 2, HALF] in float32; `cells` [tokens], block * BLOCK_TOKENS + slot or -1; `memory` the
    KV memory's elements, pages of [layer][K, V][block][head][slot][dim], of which `layer_start` is
    the layer's offset in a page and `side` that of values behind keys. The first 2 HALF dimensions
    of a head are turned and the rest is left. Grid: (tokens, heads of all kinds / BLOCK_HEADS).
    Bytes moved: 2 tokens (HEADS + 2 KV_HEADS) HEAD_DIM elements, and 8 tokens HALF of angles.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_query, is_head = head < HEADS, head < HEADS + 2 * KV_HEADS
    is_value = head >= HEADS + KV_HEADS
    pair = tl.arange(0, BLOCK_HALF)
    in_half = pair < HALF
    mask = is_head[:, None] & in_half[None, :]
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM
    first = tl.load(source + pair[None, :], mask=mask, other=0.0)
    second = tl.load(source + HALF + pair[None, :], mask=mask, other=0.0)
    rest = first
    rest_at = 2 * HALF + tl.arange(0, BLOCK_REST)
    rest_mask = is_head[:, None] & (rest_at < HEAD_DIM)[None, :]
    if HEAD_DIM > 2 * HALF:
        rest = tl.load(source + rest_at[None, :], mask=rest_mask, other=0.0)
    if NORMED:
        wide, wider = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(wide * wide + wider * wider, axis=1)
        if HEAD_DIM > 2 * HALF:
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1)
        scale = 1.0 / tl.sqrt_rn(squares / HEAD_DIM + epsilon)
        weight = _weight_of(is_query, query_weight, key_weight, pair, in_half)
        first = tl.where(is_value[:, None], first, _normed(first, scale, weight))
        weight = _weight_of(is_query, query_weight, key_weight, HALF + pair, in_half)
        second = tl.where(is_value[:, None], second, _normed(second, scale, weight))
        if HEAD_DIM > 2 * HALF:
            weight = _weight_of(is_query, query_weight, key_weight, rest_at, rest_at < HEAD_DIM)
            rest = tl.where(is_value[:, None], rest, _normed(rest, scale, weight))
    turning = angles + token * angles_stride + pair
    cosine = tl.load(turning, mask=in_half, other=0.0)[None, :]
    sine = tl.load(turning + HALF, mask=in_half, other=0.0)[None, :]
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned_first = tl.where(is_value[:, None], first, (a * cosine - b * sine).to(first.dtype))
    turned_second = tl.where(is_value[:, None], second, (b * cosine + a * sine).to(first.dtype))

    # A small tile is held by several warps at once: none may write before all have read.
    tl.debug_barrier()
    to_query = mask & is_query[:, None]
    tl.store(source + pair[None, :], turned_first, mask=to_query)
    tl.store(source + HALF + pair[None, :], turned_second, mask=to_query)
    cell = tl.load(cells + token).to(tl.int64)
    to_cell = (is_head & (head >= HEADS) & (cell >= 0))[:, None]
    block, slot = cell // BLOCK_TOKENS, cell % BLOCK_TOKENS
    tile = BLOCK_TOKENS * HEAD_DIM
    start = (
        block // BLOCKS_PER_PAGE * page_elements
        + layer_start
        + block % BLOCKS_PER_PAGE * (KV_HEADS * tile)
        + slot * HEAD_DIM
    )
    target = memory + start + _head_place(head, HEADS, KV_HEADS, side, tile)[:, None]
    kind = memory.dtype.element_ty
    if SCALED:
        # Scales lie as stored heads do: those of keys, then those of values.
        scale = tl.load(scales + head - HEADS, mask=is_head & (head >= HEADS), other=1.0)[:, None]
        turned_first = _fitting(turned_first, scale)
        turned_second = _fitting(turned_second, scale)
    tl.store(target + pair[None, :], turned_first.to(kind), mask=mask & to_cell)
    tl.store(target + HALF + pair[None, :], turned_second.to(kind), mask=mask & to_cell)
    if HEAD_DIM > 2 * HALF:
        tl.store(source + rest_at[None, :], rest, mask=rest_mask & is_query[:, None])
        if SCALED:
            rest = _fitting(rest, scale)
        tl.store(target + rest_at[None, :], rest.to(kind), mask=rest_mask & to_cell)


def rotate_and_store(
    qkv: torch.Tensor,
    norms: NormWeights | None,
    epsilon: float,
    angles: torch.Tensor,
    cells: torch.Tensor,
    memory: torch.Tensor,
    layout: KvLayout,
    layer: int,
    heads: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm, rotate and store one layer's heads; returns the queries [tokens, heads, head_dim].

    `qkv` [tokens, (heads + 2 kv_heads) * head_dim] is overwritten and the result is a view of it.
    `angles` [tokens, 2, pairs] come from `rotary_angles`, `cells` [tokens] are whole numbers, and
    `memory` is the KV memory as elements of its dtype, over whole pages; `scales` [K and V,
    kv_heads] are the layer's where that is FP8.
    """
    tokens, half = len(qkv), angles.shape[2]
    heads_all = heads + 2 * layout.kv_heads
    assert qkv.shape[1] == heads_all * layout.head_dim
    assert qkv.stride(1) == 1
    assert 2 * half <= layout.head_dim
    assert memory.numel() % layout.page_elements == 0
    side = layout.blocks_per_page * layout.kv_heads * layout.tile_elements
    query_weight, key_weight = (qkv, qkv) if norms is None else norms
    if tokens:
        rotate_and_store_kernel[(tokens, triton.cdiv(heads_all, HEADS_PER_PROGRAM))](
            qkv,
            query_weight,
            key_weight,
            angles,
            cells,
            memory,
            angles if scales is None else scales,
            qkv.stride(0),
            angles.stride(0),
            2 * layer * side,
            side,
            layout.page_elements,
            epsilon,
            SCALED=scales is not None,
            NORMED=norms is not None,
            HEADS=heads,
            KV_HEADS=layout.kv_heads,
            HEAD_DIM=layout.head_dim,
            HALF=half,
            BLOCKS_PER_PAGE=layout.blocks_per_page,
            BLOCK_TOKENS=layout.block_tokens,
            BLOCK_HEADS=HEADS_PER_PROGRAM,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(layout.head_dim - 2 * half, 1)),
            num_warps=4,
        )
    return qkv[:, : heads * layout.head_dim].view(tokens, heads, layout.head_dim)


def variants() -> Iterator[Variant]:
    pointers = dict.fromkeys(("qkv", "query_weight", "key_weight", "memory"), "*bf16:16")
    signature = {
        **pointers,
        "scales": "*fp32:16",
        "angles": "*fp32:16",
        "cells": "*i32:16",
        **dict.fromkeys(("qkv_stride", "angles_stride", "layer_start", "side"), "i32:16"),
        "page_elements": "i32:16",
        "epsilon": "fp32",
    }
    for heads, kv_heads, head_dim, normed, fp8 in (
        (32, 8, 64, False, False),
        (32, 8, 128, False, False),
        (32, 8, 128, True, False),
        (16, 8, 128, True, False),
        (8, 4, 256, True, False),
        (20, 20, 80, False, False),
        (32, 8, 128, False, True),
        (16, 8, 128, True, True),
    ):
        half = head_dim // 2
        yield Variant(
            f"{'fp8' if fp8 else 'bf16'} heads {heads}/{kv_heads} dim {head_dim}"
            f"{' normed' if normed else ''}",
            rotate_and_store_kernel,
            {**signature, "memory": "*fp8e4nv:16"} if fp8 else signature,
            {
                "SCALED": fp8,
                "NORMED": normed,
                "HEADS": heads,
                "KV_HEADS": kv_heads,
                "HEAD_DIM": head_dim,
                "HALF": half,
                "BLOCKS_PER_PAGE": 16,
                "BLOCK_TOKENS": 32,
                "BLOCK_HEADS": HEADS_PER_PROGRAM,
                "BLOCK_HALF": triton.next_power_of_2(half),
                "BLOCK_REST": 1,
            },
            targets=FP8_TARGETS if fp8 else (80, 90, 100),
        )
