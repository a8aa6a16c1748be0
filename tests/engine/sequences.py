"""Random sequences over a shuffled cache, computed step by step, and what is to come of them.

Any kernels can be put to it: they are given at its making.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from engine.kernels.protocol import Span
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kv_layout import KvLayout
from engine.models.spec import ModelSpec, Rope

PAGE_BYTES = 1 << 16
PAGES = 64


def make_spec(heads: int, kv_heads: int, head_dim: int, layers: int = 2) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden=64,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=96,
        vocabulary=100,
        context_tokens=512,
        tied=True,
        norm_epsilon=1e-6,
        rope=Rope(1e4),
        eos_token_ids=(),
    )


class Sequences:
    """Random sequences whose keys and values are in a cache, and plain attention over them."""

    def __init__(
        self,
        spec: ModelSpec,
        lengths: list[int],
        fill: float,
        dtype: str = "float32",
        make: Callable[[ModelSpec, KvLayout, torch.Tensor], Any] = ReferenceKernels,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        self.spec = spec
        self.layout = KvLayout.choose(spec, dtype, page_bytes)
        kind: torch.dtype = getattr(torch, dtype)
        memory = torch.full((PAGES * self.layout.page_elements,), fill, dtype=kind)
        self.kernels = make(spec, self.layout, memory.view(torch.uint8))
        generator = torch.Generator().manual_seed(len(lengths))
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.inputs = [
            torch.randn(spec.layers, length, width, generator=generator).to(kind)
            for length in lengths
        ]
        blocks = list(range(PAGES * self.layout.blocks_per_page))
        random.Random(len(lengths)).shuffle(blocks)
        self.tables: list[list[int]] = []
        for length in lengths:
            count = self.layout.blocks_for(length)
            self.tables.append(blocks[:count])
            del blocks[:count]

    def step(self, ranges: list[tuple[int, int, int]]) -> dict[int, torch.Tensor]:
        """Compute (sequence, start, count) of each; results [layers, count, width] by sequence."""
        ranges = sorted(ranges, key=lambda own: (own[2], own[1] + own[2]))
        spans = [Span(start, count, self.tables[index]) for index, start, count in ranges]
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in ranges])
        plan = self.kernels.plan(spans, positions)
        layers = []
        for layer in range(self.spec.layers):
            rows = [self.inputs[index][layer, start : start + n] for index, start, n in ranges]
            queries = self.kernels.rotate_and_store(layer, torch.cat(rows), None, 1e-6, plan)
            layers.append(self.kernels.attend(layer, queries, plan))
        parts = torch.stack(layers).split([count for _, _, count in ranges], dim=1)
        return {index: part for (index, _, _), part in zip(ranges, parts, strict=True)}

    def expected(self, index: int) -> torch.Tensor:
        """Attention of a whole sequence by the textbook, in float64: [layers, length, width]."""
        spec, inputs = self.spec, self.inputs[index].double()
        layers, length, _ = inputs.shape
        heads = inputs.view(layers, length, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        frequency = 1e4 ** (-torch.arange(0, spec.head_dim, 2).double() / spec.head_dim)
        turned = torch.arange(length).double()[:, None] * frequency
        cosine, sine = turned.cos()[:, None], turned.sin()[:, None]
        half = spec.head_dim // 2
        a, b = heads[..., :half], heads[..., half:]
        rotated = torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
        group = spec.heads // spec.kv_heads
        queries = rotated[:, :, : spec.heads]
        keys = rotated[:, :, spec.heads : spec.heads + spec.kv_heads].repeat_interleave(group, 2)
        values = heads[:, :, spec.heads + spec.kv_heads :].repeat_interleave(group, 2)
        scores = torch.einsum("lqhd,lkhd->lhqk", queries, keys) / math.sqrt(spec.head_dim)
        hidden = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("lhqk,lkhd->lqhd", weights, values).reshape(layers, length, -1)

    def in_pieces(self, chance: random.Random, sizes: list[int]) -> list[torch.Tensor]:
        """Everything, in steps of prompts' chunks of these sizes and of decodes beside each other;
        results [layers, length, width] by sequence."""
        lengths = [inputs.shape[1] for inputs in self.inputs]
        parts: list[list[torch.Tensor]] = [[] for _ in lengths]
        done = [0] * len(lengths)
        while done != lengths:
            ranges = []
            for index, length in enumerate(lengths):
                count = min(length - done[index], chance.choice(sizes))
                if count and chance.random() < 0.8:
                    ranges.append((index, done[index], count))
            for index, part in self.step(ranges).items() if ranges else ():
                parts[index].append(part)
                done[index] += part.shape[1]
        return [torch.cat(own, dim=1) for own in parts]
