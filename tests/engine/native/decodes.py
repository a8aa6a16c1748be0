"""Decodes over a stage of sequences, by a library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.kernels.native.kernels import NativeKernels
from engine.kernels.protocol import Span
from tests.engine.paged_stage import Stage
from tests.engine.sequences import make_spec


def attend(
    loaded: ctypes.CDLL, stage: Stage, spans: Sequence[Span], queries: torch.Tensor, window: int = 0
) -> torch.Tensor:
    """What the second layer attends to, over a cache that must not change."""
    layout = stage.layout
    spec = make_spec(stage.heads, layout.kv_heads, layout.head_dim)
    spec = replace(spec, windows=(0, window) if window else ())
    kernels = NativeKernels(spec, layout, stage.memory, loaded=loaded)
    before = stage.memory.clone()
    positions = torch.tensor([span.start for span in spans])
    attended = kernels.attend(1, queries, kernels.plan(spans, positions))
    if all((span.start + 1) % layout.block_tokens == 0 for span in spans):
        assert torch.equal(stage.memory, before)
    return attended


def last_tokens(stage: Stage, lengths: Sequence[int]) -> list[Span]:
    return [Span(n - 1, 1, table) for n, table in zip(lengths, stage.tables, strict=True)]
