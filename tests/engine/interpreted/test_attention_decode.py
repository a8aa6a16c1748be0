"""Decoding attention in the interpreter, held to the reference over pages with NaN around."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.protocol import Span
from engine.kernels.triton.attention_decode import Scratch, attention_decode
from engine.kernels.triton.attention_shapes import DecodeShape
from engine.kernels.triton.attention_work import items_max, list_work
from engine.kernels.triton.paging import PagedMemory
from engine.models.spec import FP8
from tests.engine.paged_stage import Stage

SPLIT = 64
LENGTHS = [1, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 5, 33]


def run(
    stage: Stage,
    lengths: list[int],
    queries: torch.Tensor,
    *,
    layer: int = 1,
    programs: int = 3,
    window: int = 0,
) -> torch.Tensor:
    layout = stage.layout
    chosen = DecodeShape.choose(
        stage.heads, layout.kv_heads, layout.head_dim, layout.block_tokens, queries.element_size()
    )
    shape = replace(chosen, split_tokens=SPLIT, window_tokens=window)
    counted = torch.tensor(lengths, dtype=torch.int32)
    room = items_max(len(lengths), sum(lengths), SPLIT)
    items = torch.full((room, 2), -1, dtype=torch.int32)
    firsts = torch.full((len(lengths) + 1,), -1, dtype=torch.int32)
    list_work(counted, items, firsts, split_tokens=SPLIT, window_tokens=window)
    scratch = Scratch.make(shape, room, len(lengths), torch.device("cpu"))
    scratch.sums.fill_(float("nan"))
    scratch.peaks.fill_(float("nan"))
    width = stage.heads * layout.head_dim
    output = torch.full((len(lengths), width), float("nan"), dtype=queries.dtype)
    attention_decode(
        queries,
        output,
        PagedMemory(layout, stage.memory),
        layer,
        stage.padded_tables(),
        counted,
        items,
        firsts,
        scratch,
        shape,
        programs=programs,
        scales=stage.scales(layer),
    )
    assert not scratch.arrived.any()
    return output


def spans_of(stage: Stage, lengths: list[int]) -> list[Span]:
    return [Span(length - 1, 1, table) for length, table in zip(lengths, stage.tables, strict=True)]


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "block_tokens"),
    [
        (1, 2, 64, 32),
        (4, 2, 128, 32),
        (7, 1, 48, 16),
        (8, 1, 80, 32),
        (4, 1, 96, 4),
        (8, 1, 256, 32),
    ],
)
def test_it_equals_the_reference(group: int, kv_heads: int, dim: int, block_tokens: int) -> None:
    """Lengths around one split and over several, tables and pages shuffled, NaN in all slots that
    hold no key, and table entries beyond the end that would lead out of memory."""
    heads = group * kv_heads
    stage = Stage.make(LENGTHS, heads=heads, kv_heads=kv_heads, dim=dim, block_tokens=block_tokens)
    queries = stage.queries([1] * len(LENGTHS))
    for layer in range(2):
        found = run(stage, LENGTHS, queries, layer=layer)
        wanted = stage.expected(queries, spans_of(stage, LENGTHS), layer)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 40, SPLIT, 2 * SPLIT + 9])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    stage = Stage.make(LENGTHS)
    queries = stage.queries([1] * len(LENGTHS))
    found = run(stage, LENGTHS, queries, window=window)
    wanted = stage.expected(queries, spans_of(stage, LENGTHS), 1, window)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("window", "block_tokens"), [(1, 4), (SPLIT + 3, 4), (5, 32)])
def test_blocks_before_a_window_may_be_others_by_now(window: int, block_tokens: int) -> None:
    stage = Stage.make(LENGTHS, block_tokens=block_tokens)
    queries = stage.queries([1] * len(LENGTHS))
    wanted = run(stage, LENGTHS, queries, window=window)
    given_back = stage.forget_before([length - window for length in LENGTHS])
    assert given_back.tables != stage.tables
    assert torch.equal(run(given_back, LENGTHS, queries, window=window), wanted)


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "window"), [(4, 2, 64, 0), (7, 1, 80, SPLIT + 3)]
)
def test_what_is_stored_as_fp8_is_scaled(group: int, kv_heads: int, dim: int, window: int) -> None:
    """Each head by its own scale, over pages with NaN."""
    stage = Stage.make(LENGTHS, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, dtype=FP8)
    queries = stage.queries([1] * len(LENGTHS))
    found = run(stage, LENGTHS, queries, window=window)
    wanted = stage.expected(queries, spans_of(stage, LENGTHS), 1, window)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


def test_a_sequence_does_not_depend_on_the_others_or_on_the_programs() -> None:
    """Bit for bit, alone and among others, in any order, with any grid."""
    length = 3 * SPLIT + 5
    alone = Stage.make([length])
    query = alone.queries([1])
    wanted = run(alone, [length], query)[0]
    for lengths, place in (([length, 9, 200], 0), ([SPLIT, 1, length, 70], 2)):
        among = Stage.make(lengths, shuffle=place + 1)
        queries = among.queries([1] * len(lengths)).clone()
        queries[place] = query[0]
        for programs in (1, 4, 50):
            assert torch.equal(run(among, lengths, queries, programs=programs)[place], wanted)


def test_an_empty_sequence_is_zero_and_harms_none() -> None:
    """Padding of a graph's batch: no keys, a table that leads nowhere."""
    stage = Stage.make([0, 70, 0])
    queries = stage.queries([1, 1, 1])
    found = run(stage, [0, 70, 0], queries)
    assert not found[0].any()
    assert not found[2].any()
    wanted = stage.expected(queries[1:2], spans_of(stage, [0, 70, 0])[1:2], 1)
    torch.testing.assert_close(found[1:2].double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_in_bfloat16_the_error_is_at_most_twice_torchs_own(dim: int) -> None:
    stage = Stage.make(LENGTHS, dim=dim, dtype="bfloat16")
    queries = stage.queries([1] * len(LENGTHS))
    spans = spans_of(stage, LENGTHS)
    wanted = stage.expected(queries, spans, 1)
    mine = (run(stage, LENGTHS, queries).double() - wanted).abs()
    torchs = (stage.torchs_own(queries, spans, 1).double() - wanted).abs()
    assert mine.max() <= 2 * torchs.max()
    assert mine.mean() <= 2 * torchs.mean()
    assert torchs.max() > 0
