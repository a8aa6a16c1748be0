"""Norm, rotation and the KV write in one launch, held to the reference over the same pages."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.kernels.kv_scales import to_fp8
from engine.kernels.protocol import NormWeights, Span
from engine.kernels.reference import dense
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kernels.reference.paged_attention import paged_views
from engine.kernels.reference.rotary import Angles, frequencies, rotate
from engine.kernels.triton.rotary_angles import rotary_angles
from engine.kernels.triton.rotate_and_store import NO_CELL, rotate_and_store
from engine.kv_layout import KvLayout
from engine.models.spec import Llama3Scaling, ModelSpec, Rope
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch

EPSILON = 1e-6
PAGES = 8
ROPES = {
    "plain": Rope(1e4),
    "stretched": Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 64)),
}


class Stage:
    """One engine's pages, filled with what must not change, and a step over shuffled blocks."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        rope: Rope,
        lengths: list[int],
        page_bytes: int = 1 << 18,
    ) -> None:
        self.heads, self.kind = heads, getattr(torch, dtype)
        self.spec = ModelSpec(
            family="llama",
            layers=3,
            hidden=64,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=96,
            vocabulary=100,
            context_tokens=512,
            tied=True,
            norm_epsilon=EPSILON,
            rope=rope,
            eos_token_ids=(),
        )
        self.layout = KvLayout.choose(self.spec, dtype, page_bytes)
        elements = PAGES * self.layout.page_elements
        self.memory = torch.full((elements,), float("nan"), dtype=self.kind)
        blocks = list(range(PAGES * self.layout.blocks_per_page))
        random.Random(head_dim).shuffle(blocks)
        slots = self.layout.block_tokens
        spans = []
        for length in lengths:
            table = [blocks.pop() for _ in range(self.layout.blocks_for(length))]
            spans.append(Span(0, length, table))
        self.spans = sorted(spans, key=lambda span: (span.count, span.start + span.count))
        self.cells = torch.tensor(
            [
                span.blocks[token // slots] * slots + token % slots
                for span in self.spans
                for token in range(span.count)
            ],
            dtype=torch.int32,
        )
        self.positions = torch.cat([torch.arange(span.count) for span in self.spans])
        generator = torch.Generator().manual_seed(heads)
        width = (heads + 2 * kv_heads) * head_dim
        self.wide = torch.full((len(self.positions), width + 7), float("nan"), dtype=self.kind)
        self.wide[:, :width] = (
            torch.randn(len(self.positions), width, generator=generator) * 2
        ).to(self.kind)
        self.qkv = self.wide[:, :width]
        self.norms: NormWeights = (
            (1 + torch.randn(head_dim, generator=generator) / 4).to(self.kind),
            (1 + torch.randn(head_dim, generator=generator) / 4).to(self.kind),
        )

    def by_reference(self, layer: int, norms: NormWeights | None, kind: torch.dtype):
        """Queries and memory as the reference leaves them, computed in `kind`."""
        name = str(kind).removeprefix("torch.")
        ratio = kind.itemsize // self.kind.itemsize
        layout = KvLayout(
            layers=self.layout.layers,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            dtype=name,
            block_tokens=self.layout.block_tokens,
            page_bytes=self.layout.page_bytes * ratio,
        )
        memory = torch.zeros(self.memory.numel(), dtype=kind)
        kernels = ReferenceKernels(self.spec, layout, memory.view(torch.uint8))
        plan = kernels.plan(self.spans, self.positions)
        memory.fill_(float("nan"))  # planning clears blocks, which is not what is tested here
        weights = None if norms is None else (norms[0].to(kind), norms[1].to(kind))
        qkv = self.qkv.to(kind).contiguous()
        return kernels.rotate_and_store(layer, qkv, weights, EPSILON, plan), memory

    def by_kernel_as_fp8(self, layer: int, scales: torch.Tensor) -> torch.Tensor:
        """`paged_views` of memory written as FP8, which was no number in any byte before."""
        layout = replace(self.layout, fp8=True, page_bytes=self.layout.page_elements)
        memory = torch.full((self.memory.numel(),), 0xFF, dtype=torch.uint8)
        angles = rotary_angles(self.positions, frequencies(self.spec.rope, self.spec.head_dim))
        flat = memory.view(torch.float8_e4m3fn)
        rotate_and_store(
            self.qkv.clone(), None, EPSILON, angles, self.cells, flat, layout, layer, self.heads,
            scales,
        )  # fmt: skip
        return paged_views(layout, memory)

    def by_kernel(self, layer: int, norms: NormWeights | None, cells: torch.Tensor):
        frequency = frequencies(self.spec.rope, self.spec.head_dim)
        angles = rotary_angles(self.positions, frequency)
        return rotate_and_store(
            self.qkv, norms, EPSILON, angles, cells, self.memory, self.layout, layer, self.heads
        )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "rope", "normed"),
    [
        (1, 1, 48, "float32", "plain", True),
        (8, 2, 64, "bfloat16", "stretched", False),
        (4, 1, 80, "bfloat16", "plain", True),
        (7, 1, 96, "float16", "plain", True),
        (9, 3, 128, "bfloat16", "stretched", True),
        (2, 2, 256, "float32", "stretched", False),
        (3, 1, 10, "bfloat16", "plain", True),
    ],
)
def test_queries_keys_and_values_equal_the_reference(
    heads: int, kv_heads: int, head_dim: int, dtype: str, rope: str, normed: bool
) -> None:
    stage = Stage(heads, kv_heads, head_dim, dtype, ROPES[rope], [1, 2, 33])
    norms = stage.norms if normed else None
    layer = 2 if normed else 0
    exact_queries, exact_memory = stage.by_reference(layer, norms, torch.float32)
    own_queries, own_memory = stage.by_reference(layer, norms, stage.kind)
    queries = stage.by_kernel(layer, norms, stage.cells)
    assert_as_exact_as_torch(queries, own_queries, exact_queries.double())
    stored = torch.isfinite(stage.memory)
    assert torch.equal(stored, torch.isfinite(own_memory))
    assert stored.sum() == len(stage.cells) * 2 * kv_heads * head_dim
    assert_as_exact_as_torch(
        stage.memory[stored], own_memory[stored], exact_memory[stored].double()
    )
    assert torch.isnan(stage.wide[:, stage.qkv.shape[1] :]).all()


def test_tokens_without_a_cell_write_nowhere() -> None:
    stage = Stage(4, 2, 64, "bfloat16", ROPES["plain"], [5])
    cells = torch.full((5,), NO_CELL, dtype=torch.int32)
    queries = stage.by_kernel(1, stage.norms, cells)
    assert torch.isnan(stage.memory).all()
    assert torch.isfinite(queries).all()
    cells[2] = stage.cells[2]
    stage.by_kernel(1, stage.norms, cells)
    assert torch.isfinite(stage.memory).sum() == 2 * 2 * 64


def test_a_token_is_the_same_in_any_batch() -> None:
    stage = Stage(4, 2, 64, "bfloat16", ROPES["plain"], [40])
    backup = stage.wide.clone()
    together = stage.by_kernel(0, stage.norms, stage.cells).clone()
    memory = stage.memory.clone()
    stage.wide.copy_(backup)
    stage.memory.fill_(float("nan"))
    frequency = frequencies(stage.spec.rope, 64)
    for token in (0, 17, 39):
        own = slice(token, token + 1)
        alone = rotate_and_store(
            stage.qkv[own],
            stage.norms,
            EPSILON,
            rotary_angles(stage.positions[own], frequency),
            stage.cells[own],
            stage.memory,
            stage.layout,
            0,
            4,
        )
        assert torch.equal(alone[0], together[token])
    written = torch.isfinite(stage.memory)
    assert torch.equal(stage.memory[written], memory[written])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "turned"), [(64, 32), (80, 20), (48, 46)])
def test_only_the_first_dimensions_are_turned(head_dim: int, turned: int, normed: bool) -> None:
    stage = Stage(2, 1, head_dim, "float32", ROPES["plain"], [9])
    plain = stage.qkv.clone().view(9, 4, head_dim)
    frequency = frequencies(stage.spec.rope, turned)
    angles = rotary_angles(stage.positions, frequency)
    norms = stage.norms if normed else None
    rotate_and_store(
        stage.qkv, norms, EPSILON, angles, stage.cells, stage.memory, stage.layout, 0, 2
    )
    expected = plain[:, :2]
    if normed:
        expected = dense.rms_norm(expected, stage.norms[0], EPSILON)
    cosine, sine = angles[:, :1], angles[:, 1:]
    whole = Angles(torch.cat((cosine, cosine), dim=-1), sine)
    rotated = rotate(expected[..., :turned], whole)
    found = stage.qkv.view(9, 4, head_dim)[:, :2]
    torch.testing.assert_close(found[..., :turned], rotated)
    torch.testing.assert_close(found[..., turned:], expected[..., turned:])
    kept = torch.isfinite(stage.memory).sum()
    assert kept == 9 * 2 * head_dim


def test_angles_of_far_positions_are_the_references() -> None:
    positions = torch.tensor([0, 1, 1000, 131071, 1_000_000])
    frequency = frequencies(Rope(1e4), 64)
    found = rotary_angles(positions, frequency)
    turned = positions.float()[:, None] * frequency
    torch.testing.assert_close(found, torch.stack((turned.cos(), turned.sin()), dim=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 80), (2, 3, 20)])
def test_as_fp8_it_stores_what_the_reference_makes_of_the_same_numbers(
    heads: int, kv_heads: int, head_dim: int, dtype: str
) -> None:
    """To the byte; each head by its own scale, and what does not fit, or is none, as no number."""
    stage = Stage(heads, kv_heads, head_dim, dtype, ROPES["plain"], [1, 5, 33])
    stage.qkv[2, heads * head_dim] = float("nan")
    stage.qkv[3, -1] = 1e4
    scales = torch.exp2(torch.arange(2.0 * kv_heads) % 4 - 2).view(2, kv_heads)
    found = stage.by_kernel_as_fp8(1, scales).float()
    stage.by_kernel(1, None, stage.cells)
    plain = paged_views(stage.layout, stage.memory.view(torch.uint8))
    # [pages, layers, blocks, slots, K and V, heads, dim]
    numbers = plain.permute(0, 1, 3, 5, 2, 4, 6)
    wanted = to_fp8(numbers, scales).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(
        found.permute(0, 1, 3, 5, 2, 4, 6), wanted, rtol=0, atol=0, equal_nan=True
    )
    written = len(stage.cells) * 2 * kv_heads * head_dim
    assert torch.isfinite(found).sum() == written - 3, "one that is none, its pair, and a large one"
