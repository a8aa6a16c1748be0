"""The torch operations of one engine behind the Protocol that models call.

Owns the composition of the reference's parts and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.device_tensors import placed
from engine.kernels.kv_scales import no_scales, to_fp8
from engine.kernels.protocol import NormWeights, Span
from engine.kernels.reference import dense
from engine.kernels.reference.attention import (
    Gathering,
    Plan,
    entered_blocks,
    make_groups,
    write_index,
)
from engine.kernels.reference.grouping import PADDING_MAX
from engine.kernels.reference.paged_kv import PagedKv
from engine.kernels.reference.rotary import angles, frequencies, rotate
from engine.kernels.strict import STRICT_ROWS, of_fixed_rows
from engine.kv_layout import KvLayout
from engine.models.spec import ModelSpec


class ReferenceKernels:
    """See `engine.kernels.protocol.Kernels`; `memory` is the KV memory as uint8, on the
    device that computes. A `strict` one is given single tokens alone."""

    def __init__(
        self, spec: ModelSpec, layout: KvLayout, memory: torch.Tensor, *, strict: bool = False
    ) -> None:
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._kv = PagedKv(layout, memory)
        self.kv_scales = no_scales(spec, memory.device) if layout.fp8 else None
        self._attention = Gathering(self._kv, spec.heads)
        self._device = memory.device
        self._frequencies = frequencies(spec.rope, spec.head_dim).to(self._device)
        self._linear = dense.choose_linear(self._dtype, self._device)
        self._padding_max = 1.0 if strict else PADDING_MAX
        if strict:
            self._linear = of_fixed_rows(self._linear, STRICT_ROWS[self._device.type])

    def plan(self, spans: Sequence[Span], positions: torch.Tensor) -> Plan:
        self._kv.clear(entered_blocks(spans, self._kv.layout.block_tokens))
        return Plan(
            angles=angles(placed(positions, self._device), self._frequencies, self._dtype),
            write=write_index(self._kv, spans, positions.numpy()),
            groups={
                window: make_groups(
                    self._kv,
                    spans,
                    self._dtype,
                    window_tokens=window,
                    padding_max=self._padding_max,
                )
                for window in self._spec.windows_seen
            },
        )

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._linear(rows, weight, bias)

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        return dense.gated_activation(gate_up)

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return dense.rms_norm(residual.add_(rows.contiguous()), weight, epsilon)

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, norms: NormWeights | None, epsilon: float, plan: Plan
    ) -> torch.Tensor:
        spec = self._spec
        heads = qkv.contiguous().view(len(qkv), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        turned, values = heads[:, : -spec.kv_heads], heads[:, -spec.kv_heads :]
        if norms is not None:
            query, key = turned[:, : spec.heads], turned[:, spec.heads :]
            turned = torch.cat(
                (dense.rms_norm(query, norms[0], epsilon), dense.rms_norm(key, norms[1], epsilon)),
                dim=1,
            )
        turned = rotate(turned, plan.angles)
        stored = torch.cat((turned[:, spec.heads :], values), dim=1)
        if self.kv_scales is not None:
            stored = to_fp8(stored, self.kv_scales[layer].view(-1))
        cells = self._kv.cells[layer]
        cells.index_copy_(0, plan.write, stored.view(-1, cells.shape[1]))
        return turned[:, : spec.heads]

    def attend(self, layer: int, queries: torch.Tensor, plan: Plan) -> torch.Tensor:
        scales = None if self.kv_scales is None else self.kv_scales[layer]
        groups = plan.groups[self._spec.window_of(layer)]
        return self._attention.attend(layer, queries, groups, scales)
