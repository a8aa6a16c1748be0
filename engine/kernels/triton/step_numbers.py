"""What a captured step makes of the numbers that the host sent: its tokens and its block tables.

Owns two kernels and their launches. Graphs hold addresses and shapes, while tables grow and the
tokens of one step come from the one before: so tables travel packed, as long as they are, and are
laid out here at a fixed width; and a token that only the device knows travels as the row that drew
it. Nothing is read beyond a row's own table, and entries behind it are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant

TOKENS_AT_ONCE = 256
ENTRIES_AT_ONCE = 256


@triton.jit
def step_tokens_kernel(sent, drawn, tokens, count, BLOCK: tl.constexpr):
    """tokens = sent, or what was drawn in row -1 - sent where that is negative.

    Shapes: `sent` [count] int32, `drawn` [rows] int64, `tokens` [count] int32. Grid:
    (count / BLOCK,). Bytes moved: 16 count at most.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    token = tl.load(sent + place, mask=inside, other=0)
    unknown = inside & (token < 0)
    last = tl.load(drawn + (-1 - token), mask=unknown, other=0).to(tl.int32)
    tl.store(tokens + place, tl.where(unknown, last, token), mask=inside)


@triton.jit
def step_tables_kernel(
    numbers, starts, lengths, tables, table_stride, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's blocks, from where they begin in `numbers`, to its row of `tables`.

    Shapes: `numbers` int32, `starts` and `lengths` [rows] int32, `tables` [rows, width] int32.
    Grid: (rows,). Bytes moved: 8 for each block.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    blocks = tl.cdiv(tl.load(lengths + row), BLOCK_TOKENS)
    for first in range(0, blocks, BLOCK):
        place = first + tl.arange(0, BLOCK)
        block = tl.load(numbers + start + place, mask=place < blocks, other=0)
        tl.store(tables + row * table_stride + place, block, mask=place < blocks)


def step_tokens(sent: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Tokens [count] int32 of those `sent` and of those `drawn` by the step before."""
    tokens = torch.empty_like(sent)
    count = len(sent)
    grid = (triton.cdiv(count, TOKENS_AT_ONCE),)
    step_tokens_kernel[grid](sent, drawn, tokens, count, BLOCK=TOKENS_AT_ONCE)
    return tokens


def step_tables(
    numbers: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    block_tokens: int,
) -> None:
    """Fill the first rows of `tables` [rows or more, width]."""
    step_tables_kernel[(len(lengths),)](
        numbers,
        starts,
        lengths,
        tables,
        tables.stride(0),
        BLOCK_TOKENS=block_tokens,
        BLOCK=ENTRIES_AT_ONCE,
    )


def variants() -> Iterator[Variant]:
    sent = {"sent": "*i32:16", "drawn": "*i64:16", "tokens": "*i32:16", "count": "i32"}
    yield Variant("256 tokens", step_tokens_kernel, sent, {"BLOCK": TOKENS_AT_ONCE})
    tables = dict.fromkeys(("numbers", "starts", "lengths", "tables"), "*i32:16")
    yield Variant(
        "blocks of 32",
        step_tables_kernel,
        {**tables, "table_stride": "i32"},
        {"BLOCK_TOKENS": 32, "BLOCK": ENTRIES_AT_ONCE},
    )
