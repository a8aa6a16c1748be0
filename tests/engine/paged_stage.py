"""Sequences with random keys and values in shuffled pages, and NaN in every slot besides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from engine.kernels.protocol import Span
from engine.kernels.reference.paged_attention import attend_paged, paged_views
from engine.kv_layout import KvLayout
from engine.models.spec import FP8

LAYERS = 2


@dataclass
class Stage:
    """KV memory with sequences of given lengths in it, the same for each seed and length."""

    layout: KvLayout
    heads: int
    memory: torch.Tensor
    tables: list[list[int]]

    @classmethod
    def make(
        cls,
        lengths: Sequence[int],
        *,
        heads: int = 8,
        kv_heads: int = 2,
        dim: int = 64,
        dtype: str = "float32",
        block_tokens: int = 32,
        blocks_per_page: int = 3,
        shuffle: int = 0,
    ) -> Stage:
        fp8 = dtype == FP8
        item_bytes = torch.tensor([], dtype=getattr(torch, dtype)).element_size()
        block_bytes = 2 * LAYERS * kv_heads * block_tokens * dim * item_bytes
        # A rest that no block uses, a multiple of 16 elements as pages have it.
        page_bytes = blocks_per_page * block_bytes + 64
        computed = "float32" if fp8 else dtype
        layout = KvLayout(LAYERS, kv_heads, dim, computed, block_tokens, page_bytes, fp8)
        tables = cls._tables(layout, lengths, shuffle)
        pages = max((max(own, default=0) for own in tables), default=0) // blocks_per_page + 1
        kind: torch.dtype = getattr(torch, dtype)
        memory = torch.full((pages * layout.page_elements,), float("nan"), dtype=kind)
        stage = cls(layout, heads, memory.view(torch.uint8), tables)
        for length, table in zip(lengths, tables, strict=True):
            stage.fill(length, table)
        return stage

    @staticmethod
    def _tables(layout: KvLayout, lengths: Sequence[int], shuffle: int) -> list[list[int]]:
        counts = [layout.blocks_for(length) for length in lengths]
        blocks = list(range(sum(counts) + 5))
        random.Random(shuffle).shuffle(blocks)
        return [[blocks.pop() for _ in range(count)] for count in counts]

    def fill(self, length: int, table: Sequence[int]) -> None:
        views = paged_views(self.layout, self.memory)
        layout = self.layout
        for token in range(length):
            page, inner = divmod(table[token // layout.block_tokens], layout.blocks_per_page)
            views[page, :, :, inner, :, token % layout.block_tokens] = torch.randn(
                LAYERS, 2, layout.kv_heads, layout.head_dim, generator=_generator(length, token)
            )

    def forget_before(self, firsts: Sequence[int]) -> Stage:
        """The same, but that blocks before the token `firsts` of each sequence are another's by
        now: their contents are NaN, and their places in the tables have block 0, which nobody has.
        """
        layout, other = self.layout, Stage(self.layout, self.heads, self.memory.clone(), [])
        views = paged_views(layout, other.memory)
        for table, first in zip(self.tables, firsts, strict=True):
            unseen = max(0, first) // layout.block_tokens
            for block in table[:unseen]:
                page, inner = divmod(block, layout.blocks_per_page)
                views[page, :, :, inner] = float("nan")
            other.tables.append([0] * unseen + table[unseen:])
        return other

    def queries(self, counts: Sequence[int]) -> torch.Tensor:
        """Queries for spans of `counts` tokens, a view with room between its tokens."""
        dim = self.layout.head_dim
        whole = torch.randn(
            sum(counts), self.heads + 2, dim, generator=torch.Generator().manual_seed(len(counts))
        )
        return whole.to(getattr(torch, self.layout.dtype))[:, : self.heads]

    def padded_tables(self) -> torch.Tensor:
        """[sequences, blocks] int32; entries beyond a sequence's end name no block there is."""
        width = max(map(len, self.tables), default=0) + 1
        padded = [own + [1 << 20] * (width - len(own)) for own in self.tables]
        return torch.tensor(padded, dtype=torch.int32)

    def expected(
        self, queries: torch.Tensor, spans: Sequence[Span], layer: int, window: int = 0
    ) -> torch.Tensor:
        layout, scales = self.layout, self.scales(layer)
        return attend_paged(
            queries, layout, self.memory, layer, spans, window_tokens=window, scales=scales
        )

    def scales(self, layer: int) -> torch.Tensor | None:
        """Unlike ones for each head, keys and values; None where nothing is scaled."""
        if not self.layout.fp8:
            return None
        exponents = torch.arange(2.0 * self.layout.kv_heads).view(2, -1) % 5 - 2 - layer
        return torch.exp2(exponents)

    def torchs_own(self, queries: torch.Tensor, spans: Sequence[Span], layer: int) -> torch.Tensor:
        """What torch's attention makes of the same in the dtype of the cache."""
        views, layout = paged_views(self.layout, self.memory), self.layout
        rows, token = [], 0
        for span in spans:
            cells = [divmod(block, layout.blocks_per_page) for block in span.blocks]
            both = torch.stack([views[page, layer, :, inner] for page, inner in cells], dim=2)
            end = span.start + span.count
            keys, values = both.reshape(2, layout.kv_heads, -1, layout.head_dim)[:, :, :end]
            own = queries[token : token + span.count].transpose(0, 1)
            token += span.count
            seen = torch.arange(end) <= torch.arange(span.start, end)[:, None]
            attended = functional.scaled_dot_product_attention(
                own[None], keys[None], values[None], attn_mask=seen, enable_gqa=True
            )
            rows.append(attended[0].transpose(0, 1).reshape(span.count, -1))
        return torch.cat(rows)


def _generator(length: int, token: int) -> torch.Generator:
    return torch.Generator().manual_seed(length * 100_003 + token)
