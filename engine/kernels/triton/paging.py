"""KV memory as kernels see it: one flat tensor, and how far its parts lie from each other.

Owns the arithmetic that turns a `KvLayout` into a kernel's arguments. It never reads the memory.
Invariant: a key of block `b`, head `h`, slot `s` of a layer begins, in elements, at
`b // blocks_per_page * page_stride + keys_at + ((b % blocks_per_page * kv_heads + h) *
block_tokens + s) * head_dim`, and its value at the same place with `values_at`.
"""

from __future__ import annotations

import torch

from engine.kv_layout import KvLayout


class PagedMemory:
    """The KV memory of one engine, `memory` as uint8 over all of its pages."""

    def __init__(self, layout: KvLayout, memory: torch.Tensor) -> None:
        self.layout = layout
        self.flat = memory.view(getattr(torch, layout.stored_dtype))
        self.page_stride = layout.page_elements
        self.side = layout.blocks_per_page * layout.kv_heads * layout.tile_elements
        """Elements of all keys, or all values, of a layer in a page."""

    def keys_at(self, layer: int) -> int:
        """Where a layer's keys begin in a page, in elements."""
        return 2 * layer * self.side

    def values_at(self, layer: int) -> int:
        """Where a layer's values begin in a page, in elements."""
        return (2 * layer + 1) * self.side
