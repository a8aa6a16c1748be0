"""The list of what decoding attention has to do, made on the device from the lengths there.

In: `lengths` [sequences] int32, keys that each sequence's query sees (its own included). Out:
`items` [items, 2] int32, (sequence, split) of each split of `SPLIT` tokens that holds a visible
key, sequence by sequence and splits ascending; `firsts` [sequences + 1] int32, the first item of
each sequence, and in the end their number. A sequence without keys has one item, so that its row
is written all the same. Splits start at multiples of `SPLIT` from the sequence's beginning,
whatever the window hides, so a list depends on nothing but each length. Grid: one program a
sequence. Moves 4 bytes a sequence in, for each of them, and 8 bytes an item out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant

SEQUENCES_MAX = 1024
"""Decodes in one step: each program looks at all lengths at once."""
WRITTEN_AT_ONCE = 64


@triton.jit
def attention_work_kernel(
    lengths,
    items,
    firsts,
    sequences,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    own = tl.program_id(0)
    every = tl.arange(0, SEQUENCES)
    length = tl.load(lengths + every, mask=every < sequences, other=0)
    hidden = tl.maximum(length - WINDOW, 0) // SPLIT if WINDOW > 0 else tl.zeros_like(length)
    splits = tl.maximum(tl.cdiv(length, SPLIT) - hidden, 1)
    first = tl.sum(tl.where(every < own, splits, 0))
    count = tl.sum(tl.where(every == own, splits, 0))
    split = tl.sum(tl.where(every == own, hidden, 0))
    tl.store(firsts + own, first)
    if own == sequences - 1:
        tl.store(firsts + sequences, first + count)
    for written in range(0, count, WRITTEN):
        place = written + tl.arange(0, WRITTEN)
        item = items + 2 * (first + place)
        tl.store(item, own, mask=place < count)
        tl.store(item + 1, split + place, mask=place < count)


def items_max(sequences: int, tokens: int, split_tokens: int, window_tokens: int = 0) -> int:
    """Items of `sequences` that hold at most `tokens` tokens together: what `items` must hold."""
    most = sequences + tokens // split_tokens
    if window_tokens:
        # A window begins and ends anywhere within splits.
        most = min(most, sequences * (1 + -(-window_tokens // split_tokens)))
    return most


def list_work(
    lengths: torch.Tensor,
    items: torch.Tensor,
    firsts: torch.Tensor,
    *,
    split_tokens: int,
    window_tokens: int = 0,
) -> None:
    """Fill `items` and `firsts` for `lengths`; a window of 0 hides nothing."""
    sequences = len(lengths)
    assert 0 < sequences <= SEQUENCES_MAX
    assert len(firsts) > sequences
    attention_work_kernel[(sequences,)](
        lengths,
        items,
        firsts,
        sequences,
        SPLIT=split_tokens,
        WINDOW=window_tokens,
        SEQUENCES=triton.next_power_of_2(sequences),
        WRITTEN=WRITTEN_AT_ONCE,
    )


def variants() -> Iterator[Variant]:
    signature = {"lengths": "*i32:16", "items": "*i32:16", "firsts": "*i32:16", "sequences": "i32"}
    for sequences, window in ((32, 0), (SEQUENCES_MAX, 4096)):
        yield Variant(
            f"{sequences} sequences window {window}",
            attention_work_kernel,
            signature,
            {"SPLIT": 256, "WINDOW": window, "SEQUENCES": sequences, "WRITTEN": WRITTEN_AT_ONCE},
        )
