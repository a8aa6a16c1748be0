"""How the attention kernels are cut for one model: tiles, splits, warps and stages.

Owns these choices; it never launches anything. They are made once for a model and a device and
never by the batch. Invariant: what is added to what in which order follows from a shape and a
sequence's own length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from engine.kernels.triton.variants import interpreting

ROWS_MIN = 16
"""Of a matrix product."""
TILE_TOKENS = 32
RESIDENT_PROGRAMS = 3
"""Programs on a multiprocessor at once: what shared memory and registers are chosen for."""
REGISTERS_MAX = 168
"""Of a thread, for that many programs of four warps in 65536 registers. Left alone, the assembler
aims at more programs than shared memory lets in, and spills for them."""
FOLDED_AT_ONCE = 4
"""Items whose sums are on their way together when they are folded."""


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """How the kernel is cut for one model. `split_tokens` decides what is added in which order, so
    it is chosen once for a model and a device and never by the batch."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    split_tokens: int
    tile_tokens: int
    num_warps: int
    num_stages: int
    window_tokens: int = 0

    @classmethod
    def choose(
        cls, heads: int, kv_heads: int, head_dim: int, block_tokens: int, item_bytes: int = 2
    ) -> DecodeShape:
        """A tile is one block where a block is large enough, and a stage at most 16 KiB: so three
        programs with three stages on their way fit a multiprocessor, of an A100 too."""
        row_bytes: int = 2 * triton.next_power_of_2(head_dim) * item_bytes
        tile = max(ROWS_MIN, min(TILE_TOKENS, (16 << 10) // row_bytes))
        return cls(heads, kv_heads, head_dim, block_tokens, 256, tile, 4, 4)

    @property
    def rows(self) -> int:
        """Rows of the products: query heads of a key head, padded."""
        return max(ROWS_MIN, int(triton.next_power_of_2(self.heads // self.kv_heads)))

    def constexprs(self) -> dict[str, int | bool]:
        """What the kernel is compiled with."""
        return {
            "GROUP": self.heads // self.kv_heads,
            "ROWS": self.rows,
            "DIM": self.head_dim,
            "COLUMNS": triton.next_power_of_2(self.head_dim),
            "BLOCK_TOKENS": self.block_tokens,
            "SPLIT": self.split_tokens,
            "TILE": self.tile_tokens,
            "WINDOW": self.window_tokens,
            "FOLDED": FOLDED_AT_ONCE,
            "WIDEN": interpreting(),
        }


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """How the kernel for chunks of prompts is cut for one model."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    rows: int
    """Of the products: tokens times query heads of a key head."""
    tile_tokens: int
    num_warps: int
    num_stages: int
    registers_max: int | None = None
    """Of a thread, where the assembler would spill if it were left alone."""
    window_tokens: int = 0

    @classmethod
    def choose(
        cls, heads: int, kv_heads: int, head_dim: int, block_tokens: int, item_bytes: int = 2
    ) -> PrefillShape:
        """As many rows and keys as leave their sums and scores in registers."""
        row_bytes: int = triton.next_power_of_2(head_dim) * item_bytes
        group: int = triton.next_power_of_2(heads // kv_heads)
        rows, tile = (128, 64) if row_bytes <= 256 else (64, 32)
        if row_bytes > 512:
            rows, tile = 32, 16
        # With small heads two programs nearly fit, and the assembler spills to let the second in.
        registers = 255 if row_bytes <= 128 else None
        rows = max(rows, group)
        return cls(heads, kv_heads, head_dim, block_tokens, rows, tile, 8, 3, registers)

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.rows // (self.heads // self.kv_heads)

    def constexprs(self) -> dict[str, int | bool]:
        """What the kernel is compiled with."""
        return {
            "GROUP": self.heads // self.kv_heads,
            "ROWS": self.rows,
            "DIM": self.head_dim,
            "COLUMNS": triton.next_power_of_2(self.head_dim),
            "BLOCK_TOKENS": self.block_tokens,
            "TILE": self.tile_tokens,
            "WINDOW": self.window_tokens,
            "WIDEN": interpreting(),
        }
