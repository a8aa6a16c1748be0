"""The operations on a processor that the native library runs on, behind what models call.

Owns the choice, operation by operation, between the library and torch: products of many rows and
prompts' attention are torch's, the rest is the library's. Invariant: with the same weights and KV
it is interchangeable with `ReferenceKernels`, whose KV memory it reads and writes alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.native.machine_code import best_library
from engine.kernels.native.products import Products
from engine.kernels.protocol import NormWeights, Span
from engine.kernels.reference.attention import (
    Gathering,
    Group,
    entered_at,
    entered_blocks,
    first_seen,
    make_groups,
    tables,
)
from engine.kernels.reference.paged_kv import PagedKv
from engine.kernels.reference.rotary import angles, frequencies
from engine.kv_layout import KvLayout
from engine.models.spec import ModelSpec

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 256)
Index = npt.NDArray[np.int64]


def computes(spec: ModelSpec, layout: KvLayout) -> bool:
    """Whether there is a library for this processor that has all the operations of this model."""
    return (
        best_library() is not None
        and layout.dtype in ("float32", "bfloat16")
        and not layout.fp8
        and spec.head_dim in HEAD_DIMS
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What the decodes of a step see of their sequences, for the layers of one window."""

    tables: Index
    """[decodes, blocks], the element at which each block's keys begin in the first layer."""
    firsts: Index
    """[decodes], the first position that is seen, counted from the table's beginning."""
    ends: Index
    """[decodes], the position behind the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of a step share."""

    cosines: torch.Tensor
    """[tokens, head_dim / 2] in float32, rounded as the model's dtype is; so are sines."""
    sines: torch.Tensor
    cells: Index
    """[tokens], the element at which each one's key of the first head and layer goes."""
    decodes: int
    seen: Mapping[int, Seen]
    """By window, as the prompts' groups are."""
    groups: Mapping[int, tuple[Group, ...]]


class NativeKernels:
    """See `engine.kernels.protocol.Kernels`; `memory` is the KV memory as uint8, on the host. A
    `strict` one is given single tokens alone. It computes by the best library for this processor
    unless `loaded` is another."""

    kv_scales = None

    def __init__(
        self,
        spec: ModelSpec,
        layout: KvLayout,
        memory: torch.Tensor,
        *,
        strict: bool = False,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        loaded = loaded or best_library()
        assert loaded is not None, "there is no library for this processor"
        self._library = loaded
        self._spec = spec
        self._layout = layout
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._half = int(self._dtype is torch.bfloat16)
        self._kv = PagedKv(layout, memory)
        self._memory = memory.data_ptr()
        self._prompts = Gathering(self._kv, spec.heads)
        self._frequencies = frequencies(spec.rope, spec.head_dim)
        self._side = layout.blocks_per_page * layout.kv_heads * layout.tile_elements
        self._products = Products(loaded, self._dtype, strict=strict)

    def plan(self, spans: Sequence[Span], positions: torch.Tensor) -> Plan:
        # OpenMP wants to be told in each thread: this tells it here what torch was told elsewhere.
        torch.get_num_threads()
        slots = self._layout.block_tokens
        self._kv.clear(entered_blocks(spans, slots))
        turned = angles(positions, self._frequencies, self._dtype)
        half = self._spec.head_dim // 2
        decodes = sum(span.count == 1 for span in spans)
        windows = self._spec.windows_seen
        return Plan(
            cosines=turned.cosine[:, 0, :half].float().contiguous(),
            sines=turned.sine[:, 0].float().contiguous(),
            cells=self._cells(spans, positions.numpy()),
            decodes=decodes,
            seen={window: self._seen(spans[:decodes], window) for window in windows},
            groups={
                window: make_groups(self._kv, spans[decodes:], self._dtype, window_tokens=window)
                for window in windows
            },
        )

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._products.linear(rows, weight, bias)

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        count, width = gate_up.shape
        out = gate_up.new_empty(count, width // 2)
        self._library.hotbay_gated_activation(
            self._half, gate_up.data_ptr(), out.data_ptr(), count, width // 2
        )
        return out

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        assert residual.is_contiguous(), "it is added to where it lies"
        rows = rows.contiguous()
        out = torch.empty_like(residual)
        self._library.hotbay_add_rms_norm(
            self._half,
            residual.data_ptr(),
            rows.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *residual.shape,
            epsilon,
        )
        return out

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, norms: NormWeights | None, epsilon: float, plan: Plan
    ) -> torch.Tensor:
        spec = self._spec
        qkv = qkv.contiguous()
        queries = qkv.new_empty(len(qkv), spec.heads, spec.head_dim)
        self._library.hotbay_rotate_and_store(
            self._half,
            qkv.data_ptr(),
            None if norms is None else norms[0].data_ptr(),
            None if norms is None else norms[1].data_ptr(),
            epsilon,
            plan.cosines.data_ptr(),
            plan.sines.data_ptr(),
            plan.cells.ctypes.data,
            self._layer(layer),
            self._side,
            self._layout.tile_elements,
            queries.data_ptr(),
            len(qkv),
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
        )
        return queries

    def attend(self, layer: int, queries: torch.Tensor, plan: Plan) -> torch.Tensor:
        spec, decodes = self._spec, plan.decodes
        window = spec.window_of(layer)
        queries = queries.contiguous()
        attended = queries.new_empty(len(queries), spec.heads * spec.head_dim)
        if decodes:
            seen = plan.seen[window]
            done = self._library.hotbay_attend(
                self._half,
                queries.data_ptr(),
                self._layer(layer),
                self._side,
                seen.tables.ctypes.data,
                seen.firsts.ctypes.data,
                seen.ends.ctypes.data,
                seen.tables.shape[1],
                self._layout.block_tokens.bit_length() - 1,
                self._layout.tile_elements,
                attended.data_ptr(),
                decodes,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
            )
            assert done, f"there is no attention over heads of {spec.head_dim}"
        if decodes < len(queries):
            attended[decodes:] = self._prompts.attend(layer, queries[decodes:], plan.groups[window])
        return attended

    def _layer(self, layer: int) -> int:
        """Where a layer's keys begin in the first page."""
        return self._memory + 2 * layer * self._side * self._layout.item_bytes

    def _starts(self, blocks: Index) -> Index:
        """The elements at which the keys of `blocks` begin."""
        pages, inner = np.divmod(blocks, self._layout.blocks_per_page)
        block_elements = self._layout.kv_heads * self._layout.tile_elements
        starts: Index = pages * self._layout.page_elements + inner * block_elements
        return starts

    def _cells(self, spans: Sequence[Span], positions: Index) -> Index:
        slots = self._layout.block_tokens
        cells = self._starts(entered_at(spans, positions, slots))
        cells += positions % slots * self._spec.head_dim
        return cells

    def _seen(self, spans: Sequence[Span], window: int) -> Seen:
        slots = self._layout.block_tokens
        before = [first_seen(span, window, slots) for span in spans]
        counts = [span.start // slots + 1 - own for span, own in zip(spans, before, strict=True)]
        skipped = np.array(before, dtype=np.int64) * slots
        starts = np.array([span.start for span in spans], dtype=np.int64)
        firsts = np.maximum(starts - window + 1, 0) if window else np.zeros_like(starts)
        return Seen(
            tables=self._starts(tables(spans, before, slots, max(counts, default=0))),
            firsts=firsts - skipped,
            ends=starts + 1 - skipped,
        )
