"""Causal attention over paged keys and values in torch, batched over sequences.

Owns how a step's spans are grouped and computed: no loop goes over tokens, and one over groups of
sequences, padded to one shape, is all there is besides the layers. Keys and values are gathered
from their pages by one index each, from the first block on that a window shows. Invariant: slots
that were never written have weight zero and hold finite numbers, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from engine.device_tensors import placed
from engine.kernels.kv_scales import from_fp8
from engine.kernels.protocol import Span
from engine.kernels.reference.grouping import PADDING_MAX, group_runs
from engine.kernels.reference.paged_kv import PagedKv
from engine.kernels.reference.rotary import Angles

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Spans that attend together, as sequences of `queries` queries and `slots` keys each."""

    tokens: slice
    """Their tokens in the step."""
    sequences: int
    queries: int
    slots: int
    gather: torch.Tensor
    """Rows of keys and values, as `PagedKv.gather_index` orders them."""
    mask: torch.Tensor
    """0 where a query sees a key and -inf elsewhere: [sequences, queries, slots]; for decodes it
    is repeated for each head, [sequences * kv_heads, 1, slots]."""
    padded: torch.Tensor | None = None
    """Token of each padded query, [sequences * queries]; None when nothing is padded."""
    unpadded: torch.Tensor | None = None
    """Padded query of each token, [tokens]."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of a step share."""

    angles: Angles
    write: torch.Tensor
    groups: Mapping[int, tuple[Group, ...]]
    """By the window of the layers that they are for."""


def make_groups(
    kv: PagedKv,
    spans: Sequence[Span],
    dtype: torch.dtype,
    *,
    window_tokens: int = 0,
    padding_max: float = PADDING_MAX,
) -> tuple[Group, ...]:
    """Group spans that lie one after the other in the step's tokens (see `group_runs`)."""
    slots = kv.layout.block_tokens
    seen = [first_seen(span, window_tokens, slots) for span in spans]
    shapes = [
        (span.count, -(-(span.start + span.count) // slots) - first)
        for span, first in zip(spans, seen, strict=True)
    ]
    groups = []
    first_token = 0
    keys_bytes = kv.layout.kv_heads * kv.layout.tile_elements * kv.layout.item_bytes
    for run in group_runs(shapes, keys_bytes, padding_max):
        members = spans[run]
        group = _group(kv, members, seen[run], shapes[run], first_token, dtype, window_tokens)
        groups.append(group)
        first_token = group.tokens.stop
    return tuple(groups)


def write_index(kv: PagedKv, spans: Sequence[Span], positions: Index) -> torch.Tensor:
    """Where the step's keys and values go: cells in the order [token, K and V, head, cell]."""
    slots = kv.layout.block_tokens
    return kv.write_index(entered_at(spans, positions, slots), positions % slots)


def entered_at(spans: Sequence[Span], positions: Index, slots: int) -> Index:
    """The block that each token of the step goes to, [tokens]."""
    if len(positions) == len(spans):
        return np.array([span.blocks[span.start // slots] for span in spans], dtype=np.int64)
    longest = max(-(-(span.start + span.count) // slots) for span in spans)
    whole = tables(spans, [0] * len(spans), slots, longest)
    sequence = np.repeat(np.arange(len(spans)), [span.count for span in spans])
    blocks: Index = whole[sequence, positions // slots]
    return blocks


def entered_blocks(spans: Sequence[Span], slots: int) -> list[int]:
    """Blocks that the step enters without filling them: the last of a span, at most."""
    entered = []
    for span in spans:
        end = span.start + span.count
        if end % slots and end // slots * slots >= span.start:
            entered.append(span.blocks[end // slots])
    return entered


Stored = tuple[torch.Tensor, torch.Tensor | None]
"""Rows of a layer's keys or values over all pages, and the scales of those that are FP8."""


class Gathering:
    """Attention over gathered keys, and then values, in one buffer that is kept between steps: what
    is gathered to the same place again is written to the cache alone."""

    def __init__(self, kv: PagedKv, heads: int) -> None:
        self._kv = kv
        self._heads = heads
        self._scale = kv.layout.head_dim**-0.5
        self._buffer = torch.empty(0, dtype=kv.keys[0].dtype, device=kv.device)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        groups: Sequence[Group],
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens, heads, head_dim] to [tokens, heads * head_dim]; `scales` [K and V, kv_heads] are
        of keys and values that are stored as FP8."""
        keys: Stored = (self._kv.keys[layer], None if scales is None else scales[0])
        values: Stored = (self._kv.values[layer], None if scales is None else scales[1])
        parts = []
        for group in groups:
            compute = self._decode if group.queries == 1 else self._prefill
            parts.append(compute(queries[group.tokens], keys, values, group))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gather(
        self, stored: Stored, group: Group, dtype: torch.dtype, place: int = 0
    ) -> torch.Tensor:
        """Keys or values of a group, at `place` of the buffer: [sequences, heads, slots, dim]."""
        rows, scales = stored
        size = group.gather.numel() * self._kv.row
        if self._buffer.numel() < 2 * size:
            self._buffer = self._buffer.new_empty(2 << (size - 1).bit_length())
        gathered = self._buffer[place * size : (place + 1) * size]
        torch.index_select(rows, 0, group.gather, out=gathered.view(-1, self._kv.row))
        heads = gathered.view(group.sequences, self._kv.layout.kv_heads, group.slots, -1)
        return heads if scales is None else from_fp8(heads, scales, dtype)

    def _decode(
        self, queries: torch.Tensor, keys: Stored, values: Stored, group: Group
    ) -> torch.Tensor:
        """One query each: the query heads of a key head are the rows of one small product."""
        heads, dim, dtype = self._kv.layout.kv_heads, self._kv.layout.head_dim, queries.dtype
        rows = queries.reshape(group.sequences * heads, self._heads // heads, dim)
        seen = self._gather(keys, group, dtype).flatten(0, 1)
        scores = torch.baddbmm(group.mask, rows, seen.transpose(1, 2), alpha=self._scale)
        weights = torch.softmax(scores, dim=-1)
        attended = torch.bmm(weights, self._gather(values, group, dtype).flatten(0, 1))
        return attended.view(group.sequences, self._heads * dim)

    def _prefill(
        self, queries: torch.Tensor, keys: Stored, values: Stored, group: Group
    ) -> torch.Tensor:
        dtype = queries.dtype
        if group.padded is not None:
            queries = queries[group.padded]
        attended = functional.scaled_dot_product_attention(
            queries.view(group.sequences, group.queries, self._heads, -1).transpose(1, 2),
            self._gather(keys, group, dtype),
            self._gather(values, group, dtype, place=1),
            attn_mask=group.mask[:, None],
            scale=self._scale,
            enable_gqa=self._heads != self._kv.layout.kv_heads,
        )
        rows = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows if group.unpadded is None else rows[group.unpadded]


def _group(
    kv: PagedKv,
    spans: Sequence[Span],
    seen: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    first_token: int,
    dtype: torch.dtype,
    window_tokens: int,
) -> Group:
    counts = np.array([span.count for span in spans])
    starts = np.array([span.start for span in spans])
    queries, blocks = int(counts.max()), max(count for _, count in shapes)
    slots = blocks * kv.layout.block_tokens
    # A padded query looks where the last real one does; its result is dropped.
    offsets = np.minimum(np.arange(queries), counts[:, None] - 1)
    keys = np.arange(slots) + np.array(seen)[:, None, None] * kv.layout.block_tokens
    positions = (starts[:, None] + offsets)[:, :, None]
    hidden = keys > positions
    if window_tokens:
        hidden |= keys <= positions - window_tokens
    mask = torch.zeros(hidden.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
    if queries == 1:
        mask = mask.repeat_interleave(kv.layout.kv_heads, dim=0)
    padded = unpadded = None
    if queries > 1 and counts.min() != queries:
        firsts = np.cumsum(counts) - counts
        padded = placed(torch.from_numpy((firsts[:, None] + offsets).reshape(-1)), kv.device)
        real = np.arange(queries) < counts[:, None]
        unpadded = placed(torch.from_numpy(np.flatnonzero(real)), kv.device)
    return Group(
        tokens=slice(first_token, first_token + int(counts.sum())),
        sequences=len(spans),
        queries=queries,
        slots=slots,
        gather=kv.gather_index(tables(spans, seen, kv.layout.block_tokens, blocks)),
        mask=placed(mask, kv.device),
        padded=padded,
        unpadded=unpadded,
    )


def first_seen(span: Span, window_tokens: int, slots: int) -> int:
    """The first block that any token of a span sees."""
    return max(0, span.start - window_tokens + 1) // slots if window_tokens else 0


def tables(spans: Sequence[Span], seen: Sequence[int], slots: int, blocks: int) -> Index:
    """Block tables from the blocks `seen` on, padded to `blocks` with the first of these.

    A table may go on beyond what the span reaches, with blocks that nothing was written to yet:
    they are left out.
    """
    padded = np.empty((len(spans), blocks), dtype=np.int64)
    for row, span, first in zip(padded, spans, seen, strict=True):
        own = span.blocks[first : -(-(span.start + span.count) // slots)]
        row[: len(own)] = own
        row[len(own) :] = own[0]
    return padded
