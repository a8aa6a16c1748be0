"""Attention of prompt chunks in the interpreter, held to the reference over pages with NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.protocol import Span
from engine.kernels.reference.paged_attention import paged_views
from engine.kernels.triton.attention_prefill import (
    attention_prefill,
    prefill_spans,
    prefill_tiles,
)
from engine.kernels.triton.attention_shapes import PrefillShape
from engine.kernels.triton.paging import PagedMemory
from engine.models.spec import FP8
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch
from tests.engine.paged_stage import Stage

TILE = 16
ROWS = 16


def run(
    stage: Stage,
    spans: list[Span],
    queries: torch.Tensor,
    *,
    layer: int = 1,
    window: int = 0,
    first_row: int = 0,
) -> torch.Tensor:
    """`queries` may have rows before those of the spans, which stay as they are."""
    layout = stage.layout
    chosen = PrefillShape.choose(
        stage.heads, layout.kv_heads, layout.head_dim, layout.block_tokens, queries.element_size()
    )
    shape = replace(chosen, rows=ROWS, tile_tokens=TILE, window_tokens=window)
    output = torch.full(
        (len(queries), stage.heads * layout.head_dim), float("nan"), dtype=queries.dtype
    )
    attention_prefill(
        queries,
        output,
        PagedMemory(layout, stage.memory),
        layer,
        stage.padded_tables(),
        torch.from_numpy(prefill_spans(spans, first_row)),
        torch.from_numpy(prefill_tiles(spans, shape)),
        shape,
        scales=stage.scales(layer),
    )
    assert output[:first_row].isnan().all()
    return output[first_row:]


def mixed(stage: Stage, chunks: list[tuple[int, int]]) -> list[Span]:
    """Spans (start, count) of the stage's sequences, in order."""
    return [
        Span(start, count, table)
        for (start, count), table in zip(chunks, stage.tables, strict=True)
    ]


# Chunks that begin and end beside, at and after tiles and blocks; the first ones of a prompt, later
# ones, single tokens and the rest of a long one.
CHUNKS = [(0, 1), (0, TILE - 1), (0, TILE), (0, TILE + 1), (7, 20), (TILE, 9), (90, 5), (33, 1)]
LENGTHS = [start + count for start, count in CHUNKS]


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "block_tokens"),
    [
        (1, 2, 64, 32),
        (4, 2, 128, 32),
        (7, 1, 48, 16),
        (8, 1, 80, 32),
        (4, 1, 96, 4),
        (8, 1, 256, 8),
    ],
)
def test_it_equals_the_reference(group: int, kv_heads: int, dim: int, block_tokens: int) -> None:
    """Many spans in one launch, rows of others before them, and NaN wherever no key is."""
    stage = Stage.make(
        LENGTHS, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, block_tokens=block_tokens
    )
    spans = mixed(stage, CHUNKS)
    queries = stage.queries([2, *(span.count for span in spans)])
    found = run(stage, spans, queries, first_row=2)
    wanted = stage.expected(queries[2:], spans, 1)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 5, TILE, 2 * TILE + 3])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    stage = Stage.make(LENGTHS)
    spans = mixed(stage, CHUNKS)
    queries = stage.queries([span.count for span in spans])
    found = run(stage, spans, queries, window=window)
    wanted = stage.expected(queries, spans, 1, window)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("window", "block_tokens"), [(1, 4), (2 * TILE + 3, 4), (5, 32)])
def test_blocks_before_a_window_may_be_others_by_now(window: int, block_tokens: int) -> None:
    stage = Stage.make(LENGTHS, block_tokens=block_tokens)
    spans = mixed(stage, CHUNKS)
    queries = stage.queries([span.count for span in spans])
    wanted = run(stage, spans, queries, window=window)
    given_back = stage.forget_before([start - window + 1 for start, _ in CHUNKS])
    assert given_back.tables != stage.tables
    found = run(given_back, mixed(given_back, CHUNKS), queries, window=window)
    assert torch.equal(found, wanted)


def test_scores_far_below_nothing_at_all_still_count() -> None:
    """A token that sees no key of the tiles before its own must not take their place as a peak."""
    stage = Stage.make([TILE + 4], kv_heads=1, heads=1)
    spans = mixed(stage, [(0, TILE + 4)])
    views = paged_views(stage.layout, stage.memory)
    views[:, :, 0] = views[:, :, 0].abs()
    queries = -200 * stage.queries([TILE + 4]).abs()
    found = run(stage, spans, queries, window=3)
    wanted = stage.expected(queries, spans, 1, 3)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "window"), [(4, 2, 64, 0), (7, 1, 80, TILE + 3)]
)
def test_what_is_stored_as_fp8_is_scaled(group: int, kv_heads: int, dim: int, window: int) -> None:
    """Each head by its own scale, over pages with NaN."""
    stage = Stage.make(LENGTHS, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, dtype=FP8)
    spans = mixed(stage, CHUNKS)
    queries = stage.queries([span.count for span in spans])
    found = run(stage, spans, queries, window=window)
    wanted = stage.expected(queries, spans, 1, window)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


def test_a_token_does_not_depend_on_its_chunk_or_on_other_spans() -> None:
    """Whole and in chunks of any size, alone and among others: bit for bit where a token keeps its
    row in a tile. In another row the processor's products, not the kernel, may round otherwise."""
    length = 2 * TILE + 5
    stage = Stage.make([length, 40])
    queries = stage.queries([length])
    whole = run(stage, [Span(0, length, stage.tables[0])], queries)
    for size in (7, 8):
        parts = []
        for start in range(0, length, size):
            count = min(size, length - start)
            rows = torch.cat((queries[:9], queries[start : start + count]))
            swapped = replace_order(stage)
            spans = [Span(31, 9, swapped.tables[0]), Span(start, count, swapped.tables[1])]
            parts.append(run(swapped, spans, rows)[9:])
        if size % (ROWS // 4):
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
        else:
            assert torch.equal(torch.cat(parts), whole), size


def replace_order(stage: Stage) -> Stage:
    """The same memory with its two sequences the other way round."""
    return replace(stage, tables=stage.tables[::-1])


@pytest.mark.parametrize("dim", [64, 128])
def test_in_bfloat16_the_error_is_at_most_twice_torchs_own(dim: int) -> None:
    stage = Stage.make(LENGTHS, dim=dim, dtype="bfloat16")
    spans = mixed(stage, CHUNKS)
    queries = stage.queries([span.count for span in spans])
    assert_as_exact_as_torch(
        run(stage, spans, queries),
        stage.torchs_own(queries, spans, 1),
        stage.expected(queries, spans, 1),
    )


def test_tiles_are_all_tokens_once_and_the_longest_first() -> None:
    shape = replace(PrefillShape.choose(8, 2, 64, 32), rows=ROWS)
    spans = [Span(0, 1, []), Span(50, 9, []), Span(3, shape.tokens, [])]
    tiles = prefill_tiles(spans, shape).tolist()
    assert sorted(tiles) == [[0, 0], [1, 0], [1, 4], [1, 8], [2, 0]]
    ends = [spans[index].start + first for index, first in tiles]
    assert ends == sorted(ends, reverse=True)
    assert prefill_tiles([], shape).shape == (0, 2)
    assert prefill_spans(spans, 5).tolist() == [[0, 1, 5], [50, 9, 6], [3, 4, 15]]
