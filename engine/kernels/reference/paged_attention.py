"""Attention over paged keys and values in a few lines of torch: what kernels for it must equal.

Owns nothing. It goes from sequence to sequence and gathers whole blocks, in the dtype asked for;
what serves on the processor is `attention`, which computes the same over many sequences at once.
Invariant: slots at and beyond a sequence's end are never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.protocol import Span
from engine.kv_layout import KvLayout


def paged_views(layout: KvLayout, memory: torch.Tensor) -> torch.Tensor:
    """KV memory (uint8) as [pages, layers, K and V, blocks_per_page, kv_heads, slots, head_dim]."""
    flat = memory.view(getattr(torch, layout.stored_dtype))
    tile = layout.tile_elements
    side = layout.blocks_per_page * layout.kv_heads * tile
    return flat.as_strided(
        (
            memory.numel() // layout.page_bytes,
            layout.layers,
            2,
            layout.blocks_per_page,
            layout.kv_heads,
            layout.block_tokens,
            layout.head_dim,
        ),
        (layout.page_elements, 2 * side, side, layout.kv_heads * tile, tile, layout.head_dim, 1),
    )


def attend_paged(
    queries: torch.Tensor,
    layout: KvLayout,
    memory: torch.Tensor,
    layer: int,
    spans: Sequence[Span],
    *,
    window_tokens: int = 0,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention of `queries` [tokens, heads, head_dim] to [tokens, heads * head_dim].

    A query sees the keys of its own position and before it; with a window, its own and the
    `window_tokens - 1` before it. `scales` [K and V, kv_heads] are of what is stored as FP8.
    Computed and returned in `dtype`.
    """
    views = paged_views(layout, memory)
    rows = []
    token = 0
    for span in spans:
        own = queries[token : token + span.count]
        token += span.count
        end = span.start + span.count
        cells = [divmod(block, layout.blocks_per_page) for block in span.blocks]
        both = torch.stack([views[page, layer, :, inner] for page, inner in cells], dim=2)
        # [K and V, head, token, dim]
        both = both.reshape(2, layout.kv_heads, -1, layout.head_dim)[:, :, :end].to(dtype)
        if scales is not None:
            both = both * scales.to(dtype)[:, :, None, None]
        group = own.shape[1] // layout.kv_heads
        keys, values = both.repeat_interleave(group, dim=1)
        scores = own.to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * layout.head_dim**-0.5
        distance = torch.arange(span.start, end)[:, None] - torch.arange(end)
        hidden = (distance < 0) | (distance >= (window_tokens or end))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        rows.append((weights @ values).transpose(0, 1).reshape(span.count, -1))
    return torch.cat(rows)
