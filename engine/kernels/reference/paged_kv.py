"""The KV cache as torch sees it: rows over whole pages, gathered and written by index.

Owns the views over KV memory and the indices into them. It never computes attention. A page is
[layer][K, V][block][head][slot][dim] followed by a rest too small for a block. Rows must tile pages
exactly, or those of later pages would not start where a row does: so a row is the largest unit that
divides both the page and what is moved, which for a head size that is a power of two is the whole
of it: one head's slots of a block when gathering, one head of a token when writing. The place of a
layer in a page is an offset that all pages share: each layer has its own view of the same rows,
shifted by it, and one index per step serves all layers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from engine.device_tensors import placed
from engine.kv_layout import KvLayout

Index = npt.NDArray[np.int64]


class PagedKv:
    """Views over the KV memory of one engine, `memory` as uint8 over all of its pages."""

    def __init__(self, layout: KvLayout, memory: torch.Tensor) -> None:
        self.layout = layout
        self.device = memory.device
        flat = memory.view(getattr(torch, layout.moved_dtype))
        page, heads = layout.page_elements, layout.kv_heads
        tile, dim = layout.tile_elements, layout.head_dim
        self.row = math.gcd(page, tile)
        self.cell = math.gcd(page, dim)
        side = layout.blocks_per_page * heads * tile  # all keys, or all values, of a layer
        self.keys = [flat[2 * layer * side :].view(-1, self.row) for layer in range(layout.layers)]
        self.values = [
            flat[(2 * layer + 1) * side :].view(-1, self.row) for layer in range(layout.layers)
        ]
        self.cells = [
            flat[2 * layer * side :].view(-1, self.cell) for layer in range(layout.layers)
        ]
        blocks = (memory.numel() // layout.page_bytes, 2 * layout.layers, layout.blocks_per_page)
        self._blocks = flat.as_strided((*blocks, heads * tile), (page, side, heads * tile, 1))
        rows, cells = tile // self.row, dim // self.cell
        self._page_rows, self._page_cells = page // self.row, page // self.cell
        self._block_rows, self._block_cells = heads * rows, heads * layout.block_tokens * cells
        self._head_rows: Index = np.arange(heads * rows, dtype=np.int64).reshape(heads, 1, rows)
        head_cells = np.arange(heads, dtype=np.int64) * layout.block_tokens * cells
        sides = np.array([0, side // self.cell], dtype=np.int64)
        self._cells: Index = (
            sides[:, None, None] + head_cells[:, None] + np.arange(cells, dtype=np.int64)
        )
        self._slot_cells = cells

    def gather_index(self, tables: Index) -> torch.Tensor:
        """Rows of `tables` [sequences, blocks], in the order [sequence, head, block, row].

        Gathered, they are [sequences, kv_heads, blocks * block_tokens, head_dim].
        """
        pages, blocks = np.divmod(tables, self.layout.blocks_per_page)
        first = pages * self._page_rows + blocks * self._block_rows
        rows = first[:, None, :, None] + self._head_rows
        return placed(torch.from_numpy(rows.reshape(-1)), self.device)

    def write_index(self, blocks: Index, slots: Index) -> torch.Tensor:
        """Cells of tokens at (`blocks`, `slots`) [tokens], as [token, K and V, head, cell]."""
        pages, inner = np.divmod(blocks, self.layout.blocks_per_page)
        first = pages * self._page_cells + inner * self._block_cells + slots * self._slot_cells
        cells = first[:, None, None, None] + self._cells
        return placed(torch.from_numpy(cells.reshape(-1)), self.device)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks over all layers.

        A block that is used in part is gathered whole. What it held before may be anything, and
        a weight of zero times not-a-number is not zero.
        """
        if blocks:
            pages, inner = np.divmod(np.array(blocks), self.layout.blocks_per_page)
            index = placed(torch.from_numpy(np.stack((pages, inner))), self.device)
            self._blocks[index[0], :, index[1]] = 0
