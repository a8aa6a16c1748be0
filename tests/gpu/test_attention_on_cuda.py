"""Attention as machine code: held to the reference, and the same in every launch and batch.

What the interpreter cannot show: splits that end in any order, and the last one folding them all.
"""

from __future__ import annotations

import pytest
import torch

from engine.kernels.protocol import Span
from tests.engine.paged_stage import Stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LENGTHS = [1, 255, 256, 257, 2000, 600]
ROUNDS = 20


def run(stage: Stage, lengths: list[int], queries: torch.Tensor) -> torch.Tensor:
    from engine.kernels.triton.attention_decode import Scratch, attention_decode
    from engine.kernels.triton.attention_shapes import DecodeShape
    from engine.kernels.triton.attention_work import items_max, list_work
    from engine.kernels.triton.paging import PagedMemory

    layout, device = stage.layout, torch.device("cuda")
    shape = DecodeShape.choose(stage.heads, layout.kv_heads, layout.head_dim, layout.block_tokens)
    counted = torch.tensor(lengths, dtype=torch.int32, device=device)
    room = items_max(len(lengths), sum(lengths), shape.split_tokens)
    items = torch.empty((room, 2), dtype=torch.int32, device=device)
    firsts = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
    list_work(counted, items, firsts, split_tokens=shape.split_tokens)
    scratch = Scratch.make(shape, room, len(lengths), device)
    width = stage.heads * layout.head_dim
    output = torch.empty((len(lengths), width), dtype=queries.dtype, device=device)
    memory = PagedMemory(layout, stage.memory.to(device))
    tables, queries = stage.padded_tables().to(device), queries.to(device)
    rounds = []
    for _ in range(ROUNDS):
        attention_decode(
            queries, output, memory, 1, tables, counted, items, firsts, scratch, shape, programs=256
        )
        rounds.append(output.cpu())
        assert not scratch.arrived.any()
    assert all(torch.equal(one, rounds[0]) for one in rounds)
    return rounds[0]


@pytest.mark.parametrize(("group", "dim"), [(4, 64), (4, 128), (7, 128), (8, 256), (1, 80)])
def test_decoding_is_as_exact_as_torch_and_its_own_alone(group: int, dim: int) -> None:
    stage = Stage.make(LENGTHS, heads=2 * group, dim=dim, dtype="bfloat16")
    queries = stage.queries([1] * len(LENGTHS))
    found = run(stage, LENGTHS, queries)
    spans = [
        Span(length - 1, 1, table) for length, table in zip(LENGTHS, stage.tables, strict=True)
    ]
    wanted = stage.expected(queries, spans, 1)
    own = (stage.torchs_own(queries, spans, 1).double() - wanted).abs().max()
    assert (found.double() - wanted).abs().max() <= 2 * own
    for place in (3, 4):
        single = Stage(stage.layout, stage.heads, stage.memory, [stage.tables[place]])
        alone = run(single, [LENGTHS[place]], queries[place : place + 1])
        assert torch.equal(alone[0], found[place])
