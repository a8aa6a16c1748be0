"""Where keys and values lie inside a page of KV memory.

Owns the arithmetic of blocks and pages; it never holds memory and never imports torch. A page holds
all layers of a run of blocks, as [layer][K, V][block][head][slot][dim], so that a page passes whole
between weights and KV and between models. Invariant: a block lies in one page, and block number
`n` is block `n % blocks_per_page` of page `n // blocks_per_page`.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import BlockTooLarge, KvTooSmall
from engine.models.spec import DTYPE_BYTES, FP8, ModelSpec

BLOCK_TOKENS_MAX = 32
"""Small blocks share more prefixes and waste less; large ones make shorter tables."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of a page. Sizes in elements unless the name says bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    """What is computed in."""
    block_tokens: int
    page_bytes: int
    fp8: bool = False
    """Whether keys and values are stored as FP8, scaled (see `engine.kernels.kv_scales`)."""

    @classmethod
    def choose(cls, spec: ModelSpec, dtype: str, page_bytes: int, *, fp8: bool = False) -> KvLayout:
        """The largest block, a power of two of tokens, that fits a page.

        Raises BlockTooLarge when not even one token does.
        """
        token_bytes = spec.kv_bytes_per_token(FP8 if fp8 else dtype)
        block_tokens = BLOCK_TOKENS_MAX
        while block_tokens > 1 and block_tokens * token_bytes > page_bytes:
            block_tokens //= 2
        if token_bytes > page_bytes:
            raise BlockTooLarge(
                f"the keys and values of one token take {token_bytes} bytes over all layers, and "
                f"a page has {page_bytes}: set a page size of at least {token_bytes} bytes",
                token_bytes=token_bytes,
                page_bytes=page_bytes,
            )
        return cls(
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            block_tokens=block_tokens,
            page_bytes=page_bytes,
            fp8=fp8,
        )

    @property
    def stored_dtype(self) -> str:
        """What keys and values are in memory."""
        return FP8 if self.fp8 else self.dtype

    @property
    def moved_dtype(self) -> str:
        """As what they are copied and indexed: not every operation knows FP8."""
        return "uint8" if self.fp8 else self.dtype

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored element."""
        return 1 if self.fp8 else DTYPE_BYTES[self.dtype]

    @property
    def page_elements(self) -> int:
        """Elements of a page, those that no block uses included."""
        return self.page_bytes // self.item_bytes

    @property
    def tile_elements(self) -> int:
        """Elements of one head's slots in a block: [slot][dim], contiguous."""
        return self.block_tokens * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.tile_elements * self.item_bytes

    @property
    def blocks_per_page(self) -> int:
        """Whole blocks in a page."""
        return self.page_bytes // self.block_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.block_tokens)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence."""
        return self.pages_of(self.blocks_for(tokens))

    def pages_of(self, blocks: int) -> int:
        """Pages that have so many blocks."""
        return -(-blocks // self.blocks_per_page)

    def require_room(self, context_tokens: int, blocks: int, pages_max: int) -> None:
        """Raise KvTooSmall when `pages_max` pages have not the `blocks` that one sequence of
        `context_tokens` holds at once."""
        needed = self.pages_of(blocks)
        if needed > pages_max:
            raise KvTooSmall(
                f"the KV of {context_tokens} tokens takes {needed} pages of {self.page_bytes} "
                f"bytes, and there is room for {pages_max}: raise it to "
                f"{needed * self.page_bytes} bytes, or lower context_tokens",
                needed_bytes=needed * self.page_bytes,
                available_bytes=pages_max * self.page_bytes,
            )
