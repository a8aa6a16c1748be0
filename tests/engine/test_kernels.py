"""The reference operations against plain formulas, and their indifference to unused memory."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from engine.kernels.protocol import Span
from engine.kernels.reference import dense
from engine.kernels.reference.grouping import GROUP_KEYS_BYTES_MAX, PADDING_MAX, group_runs
from engine.kernels.reference.rotary import Angles, rotate
from tests.engine.sequences import PAGES, Sequences, make_spec


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 16), (8, 2, 24), (7, 1, 10), (4, 1, 64), (6, 3, 34), (8, 8, 48)],
)
def test_attention_over_shuffled_pages_equals_the_textbook(
    heads: int, kv_heads: int, head_dim: int, fill: float
) -> None:
    """Prompts in chunks, then decodes, of unlike lengths; unused memory holds anything."""
    slots = 32
    lengths = [1, 2, slots - 1, slots, slots + 1, 3 * slots, 75, 130]
    stage = Sequences(make_spec(heads, kv_heads, head_dim), lengths, fill)
    found = stage.in_pieces(random.Random(3), [1, 1, 7, 32, 33, 64])
    for index in range(len(lengths)):
        torch.testing.assert_close(
            found[index].double(), stage.expected(index), rtol=0, atol=2e-5, msg=f"{index}"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_in_half_precision(dtype: str) -> None:
    stage = Sequences(make_spec(8, 2, 32), [5, 70, 40], float("nan"), dtype)
    first = stage.step([(0, 0, 4), (1, 0, 69), (2, 0, 39)])
    second = stage.step([(0, 4, 1), (1, 69, 1), (2, 39, 1)])
    for index in range(3):
        found = torch.cat((first[index], second[index]), dim=1).double()
        bound = 0.05 if dtype == "bfloat16" else 0.01
        assert (found - stage.expected(index)).abs().max() < bound


def test_writing_touches_its_own_slots_alone() -> None:
    stage = Sequences(make_spec(4, 2, 24), [40, 33, 3], 7.0)
    stage.step([(0, 0, 40), (1, 0, 33), (2, 0, 3)])
    layout = stage.layout
    memory = stage.kernels._kv._blocks
    used = {block for table in stage.tables for block in table}
    for page in range(PAGES):
        for inner in range(layout.blocks_per_page):
            if page * layout.blocks_per_page + inner not in used:
                assert (memory[page, :, inner] == 7.0).all()


def test_norm_and_activation() -> None:
    rows, weight = torch.randn(5, 24), torch.randn(24)
    scaled = rows.double() / (rows.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        dense.rms_norm(rows, weight, 1e-5).double(), scaled * weight, rtol=1e-5, atol=1e-6
    )
    gate, up = rows[:, :12].double(), rows[:, 12:].double()
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(
        dense.gated_activation(rows).double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 8, 64, 96, 97])
def test_linear_with_and_without_bias(dtype: torch.dtype, count: int) -> None:
    rows = torch.randn(count, 40).to(dtype)
    weight, bias = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype)
    linear = dense.choose_linear(dtype, torch.device("cpu"))
    exact = rows.double() @ weight.double().T
    bound = 1e-4 if dtype is torch.float32 else 0.2
    assert (linear(rows, weight, None).double() - exact).abs().max() < bound
    assert (linear(rows, weight, bias).double() - exact - bias.double()).abs().max() < bound
    columns = rows.t().contiguous().t()
    assert (linear(columns, weight, None).double() - exact).abs().max() < bound


def test_a_bias_is_added_before_the_sum_is_rounded() -> None:
    """257 is no bfloat16, and what is left of it without 256 is."""
    rows, weight = torch.ones(16, 257).bfloat16(), torch.ones(8, 257).bfloat16()
    linear = dense.choose_linear(torch.bfloat16, torch.device("cpu"))
    assert (linear(rows, weight, torch.full((8,), -256.0).bfloat16()) == 1.0).all()


@pytest.mark.parametrize("count", [1, 16, 40])
def test_operations_take_columns_as_they_take_rows(count: int) -> None:
    """A product may return either, and what comes after it must not mind."""
    stage = Sequences(make_spec(4, 2, 16), [count], 0.0)
    kernels = stage.kernels
    plan = kernels.plan([Span(0, count, stage.tables[0])], torch.arange(count))

    def results(place: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        wide, qkv, added = (
            place(torch.randn(count, width, generator=generator)) for width in (96, 128, 64)
        )
        residual = torch.ones(count, 64)
        normed = kernels.add_rms_norm(added, residual, torch.ones(64), 1e-6)
        queries = kernels.rotate_and_store(0, qkv, None, 1e-6, plan)
        attended = kernels.attend(0, queries, plan)
        return [kernels.gated_activation(wide), residual, normed, queries, attended]

    for row, column in zip(
        results(torch.clone), results(lambda rows: rows.t().contiguous().t()), strict=True
    ):
        torch.testing.assert_close(row, column)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    turned = torch.tensor([[[0.5, 2.0]], [[1.0, 0.0]]])
    cosine = turned.cos()
    heads = torch.randn(2, 3, 4)
    rotated = rotate(heads, Angles(torch.cat((cosine, cosine), -1), turned.sin()))
    as_complex = torch.complex(heads[..., :2], heads[..., 2:]) * torch.exp(1j * turned)
    torch.testing.assert_close(rotated, torch.cat((as_complex.real, as_complex.imag), -1))


def test_groups_are_runs_that_waste_little() -> None:
    chance = random.Random(2)
    for _ in range(200):
        shapes = sorted(
            (chance.choice([1, 1, 1, chance.randrange(2, 200)]), chance.choice([1, 2, 5, 40, 900]))
            for _ in range(chance.randrange(1, 40))
        )
        block_bytes = chance.choice([1 << 10, 1 << 15, 1 << 23])
        runs = group_runs(shapes, block_bytes)
        assert [index for run in runs for index in range(run.start, run.stop)] == list(
            range(len(shapes))
        )
        for run in runs:
            members = shapes[run]
            assert len({queries == 1 for queries, _ in members}) == 1
            if len(members) > 1:
                longest = max(blocks for _, blocks in members)
                padded = len(members) * max(queries for queries, _ in members) * longest
                own = sum(queries * blocks for queries, blocks in members)
                assert padded <= PADDING_MAX * own
                assert len(members) * longest * block_bytes <= GROUP_KEYS_BYTES_MAX
    assert group_runs([], 1) == []
    assert group_runs([(1, 4)] * 32, 1 << 13) == [slice(0, 32)]
    # As many as stay in the cache, and a sequence alone however long it is.
    assert group_runs([(1, 4)] * 6, 1 << 16) == [slice(0, 4), slice(4, 6)]
    assert group_runs([(1, 900)] * 2, 1 << 18) == [slice(0, 1), slice(1, 2)]
