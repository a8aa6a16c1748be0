"""The operations a decoder step is made of, as coarse as one kernel launch each.

Owns the Protocol and the description of a step's tokens; it never computes. Tokens of a step lie
one after the other, span by span; matrices are [tokens, width] and row-major. What a device
prepares once per step (indices, masks, rotations, work lists) is its own `plan`, which all layers
share and which models only pass on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

NormWeights = tuple[torch.Tensor, torch.Tensor]
"""Weights of the norms of query heads and key heads, [head_dim] each."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `start + count` of one sequence, whose KV lies in `blocks`."""

    start: int
    count: int
    blocks: Sequence[int]


class Kernels(Protocol):
    """One device's operations over one engine's KV cache."""

    @property
    def kv_scales(self) -> torch.Tensor | None:
        """Where the scales of stored keys and values are read, [layers, K and V, kv_heads] in
        float32, always at the same address; None where they are stored as they are."""

    def plan(self, spans: Sequence[Span], positions: torch.Tensor) -> Any:
        """Prepare a step over `spans`, sorted by (count, start + count); `positions` [tokens]."""

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[n, in] by a weight [out, in] to [n, out], whichever of its dimensions lies closest."""

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """Add `rows` to `residual` in place; return the sum's norm, each row over its root mean
        square, times `weight` [width]."""

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, norms: NormWeights | None, epsilon: float, plan: Any
    ) -> torch.Tensor:
        """Normalise heads if asked to, rotate queries and keys, and store keys and values.

        `qkv` [tokens, (heads + 2 kv_heads) * head_dim] may be overwritten. Returns the queries,
        [tokens, heads, head_dim].
        """

    def attend(self, layer: int, queries: torch.Tensor, plan: Any) -> torch.Tensor:
        """Causal attention of each query over its sequence, [tokens, heads * head_dim]."""

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[n, 2 width] to [n, width]: SiLU of the first half times the second."""
