"""Decodes by the library, held to exact ones: what they see, and what they must not."""

from __future__ import annotations

import ctypes
import random
from functools import partial

import pytest
import torch

from engine.kernels.native.kernels import HEAD_DIMS, NativeKernels
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch
from tests.engine.native.decodes import attend, last_tokens
from tests.engine.paged_stage import Stage
from tests.engine.sequences import Sequences, make_spec

BLOCK = 32
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 15, 16, 17, 700]


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decodes_attend_to_their_own_keys_alone(loaded: ctypes.CDLL, group: int, dim: int) -> None:
    """Lengths around a block and around a register; NaN in every slot that is nobody's."""
    stage = Stage.make(LENGTHS, heads=2 * group, kv_heads=2, dim=dim)
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    found = attend(loaded, stage, spans, queries)
    torch.testing.assert_close(found.double(), stage.expected(queries, spans, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("block_tokens", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 40, 699])
def test_blocks_of_any_size_and_windows(
    loaded: ctypes.CDLL, block_tokens: int, window: int
) -> None:
    stage = Stage.make(LENGTHS, block_tokens=block_tokens)
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    found = attend(loaded, stage, spans, queries, window)
    wanted = stage.expected(queries, spans, 1, window)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
    if window:
        others = stage.forget_before([length - window for length in LENGTHS])
        again = attend(loaded, others, last_tokens(others, LENGTHS), queries, window)
        assert torch.equal(again, found)


@pytest.mark.parametrize("dim", [48, 64, 80, 128, 256])
def test_attention_in_bfloat16_is_as_exact_as_torchs(loaded: ctypes.CDLL, dim: int) -> None:
    stage = Stage.make(LENGTHS, dim=dim, dtype="bfloat16")
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    assert_as_exact_as_torch(
        attend(loaded, stage, spans, queries),
        stage.torchs_own(queries, spans, 1),
        stage.expected(queries, spans, 1),
    )


def test_attention_is_the_same_bits_in_any_company(loaded: ctypes.CDLL) -> None:
    alone = Stage.make([333])
    query = alone.queries([1])
    wanted = attend(loaded, alone, last_tokens(alone, [333]), query)[0]
    for lengths, place in (([333, 9, 200], 0), ([65, 1, 333, 70, 700], 2)):
        among = Stage.make(lengths, shuffle=place + 1)
        queries = among.queries([1] * len(lengths)).clone()
        queries[place] = query[0]
        found = attend(loaded, among, last_tokens(among, lengths), queries)
        assert torch.equal(found[place], wanted)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_none(loaded: ctypes.CDLL, number: float) -> None:
    """Of one sequence: the others know nothing of it."""
    stage = Stage.make([40, 70])
    queries = stage.queries([1, 1]).clone()
    good = attend(loaded, stage, last_tokens(stage, [40, 70]), queries)
    queries[0, 0, 3] = number
    found = attend(loaded, stage, last_tokens(stage, [40, 70]), queries)
    assert not torch.isfinite(found[0, : stage.layout.head_dim]).any()
    assert torch.equal(found[1], good[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 48), (7, 1, 80), (6, 3, 32)]
)
def test_prompts_in_chunks_and_decodes_equal_the_textbook(
    loaded: ctypes.CDLL, heads: int, kv_heads: int, head_dim: int, fill: float, dtype: str
) -> None:
    """What it stores it reads, and torch's prompts read; steps have both."""
    spec = make_spec(heads, kv_heads, head_dim)
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 75, 130]
    stage = Sequences(spec, lengths, fill, dtype, partial(NativeKernels, loaded=loaded))
    found = stage.in_pieces(random.Random(heads), [1, 1, 7, 32, 33])
    for index in range(len(lengths)):
        difference = (found[index].double() - stage.expected(index)).abs().max()
        assert difference < (1e-5 if dtype == "float32" else 0.05), index
