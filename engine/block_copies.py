"""KV blocks copied to other blocks of the same memory.

Owns the view of KV memory in which a block is an index. It never decides what is copied. Invariant:
a copy is ordered with the steps before and after it, as all work on the device's stream is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.device_tensors import placed
from engine.kv_layout import KvLayout


class BlockCopies:
    """Copies within the KV memory of one engine, `memory` as uint8 over all of its pages."""

    def __init__(self, layout: KvLayout, memory: torch.Tensor) -> None:
        self._blocks_per_page = layout.blocks_per_page
        self._device = memory.device
        rows = 2 * layout.layers  # a page is [layer][K, V][block][head][slot][dim]
        row = layout.kv_heads * layout.tile_elements
        pages = memory.numel() // layout.page_bytes
        self._blocks = memory.view(getattr(torch, layout.moved_dtype)).as_strided(
            (pages, rows, layout.blocks_per_page, row),
            (layout.page_elements, row * layout.blocks_per_page, row, 1),
        )

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy from each first to each second block, all layers, keys and values."""
        if not pairs:
            return
        # [source, target][page, place][pair]
        places = np.array(np.divmod(np.array(pairs, dtype=np.int64).T, self._blocks_per_page))
        index = placed(torch.from_numpy(places), self._device)
        self._blocks[index[0, 1], :, index[1, 1]] = self._blocks[index[0, 0], :, index[1, 0]]
