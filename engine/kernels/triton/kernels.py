"""The Triton operations of one engine behind the Protocol that models call.

Owns the composition of the kernels, what a step's layers share, and the scratch memory that splits
of long sequences use. Matrix products stay torch's. A layer is at most ten launches. Invariant:
nothing here waits for the device: all that the host knows of a step goes there in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from engine.device_tensors import placed
from engine.errors import DeviceUnsuitable
from engine.kernels.kv_scales import no_scales
from engine.kernels.protocol import NormWeights, Span
from engine.kernels.reference.dense import Linear
from engine.kernels.reference.rotary import frequencies
from engine.kernels.strict import STRICT_ROWS, of_fixed_rows
from engine.kernels.triton.add_rms_norm import add_rms_norm
from engine.kernels.triton.attention_decode import Scratch, attention_decode
from engine.kernels.triton.attention_prefill import (
    attention_prefill,
    prefill_spans,
    prefill_tiles,
)
from engine.kernels.triton.attention_shapes import RESIDENT_PROGRAMS, DecodeShape, PrefillShape
from engine.kernels.triton.attention_work import items_max, list_work
from engine.kernels.triton.gated_activation import gated_activation
from engine.kernels.triton.paging import PagedMemory
from engine.kernels.triton.rotary_angles import rotary_angles
from engine.kernels.triton.rotate_and_store import rotate_and_store
from engine.kv_layout import KvLayout
from engine.models.spec import DTYPE_BYTES, ModelSpec
from engine.workspace import Workspace

PART_ITEMS = 4
"""Parts of the copied numbers begin at multiples of 16 bytes, as compiled kernels expect."""
FP8_CAPABILITY = (8, 9)
INTERPRETED_PROGRAMS = 2
"""Of a persistent grid where there are no multiprocessors to count."""

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Work:
    """What decoding attention has to do in a layer, see `attention_work`."""

    items: torch.Tensor
    firsts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of a step share; spans of one token come first and are decodes."""

    angles: torch.Tensor
    cells: torch.Tensor
    decodes: int
    lengths: torch.Tensor
    work: Mapping[int, Work]
    """By the window of the layers that it is for; nothing where there are no decodes."""
    tables: torch.Tensor
    """[spans, blocks]"""
    chunks: torch.Tensor
    tiles: torch.Tensor
    scratch: Scratch


@dataclass(frozen=True, slots=True)
class Reserved:
    """What plans of decodes work in, one at a time."""

    items: Mapping[int, torch.Tensor]
    """By window: lists of all of them are there at once."""
    scratch: Scratch
    split_tokens: int

    def suffices(self, lengths: Numbers, padding: int) -> bool:
        """Whether sequences of `lengths`, and `padding` rows beside them, have room."""
        for window, items in self.items.items():
            hidden = np.maximum(lengths - window, 0) // self.split_tokens if window else 0
            splits = -(-lengths // self.split_tokens) - hidden
            if int(splits.sum()) + padding > len(items):
                return False
        return True


class TritonKernels:
    """See `engine.kernels.protocol.Kernels`; `memory` is the KV memory as uint8, on the device
    that computes. A `strict` one is given single tokens alone."""

    def __init__(
        self, spec: ModelSpec, layout: KvLayout, memory: torch.Tensor, *, strict: bool = False
    ) -> None:
        self._spec = spec
        self._layout = layout
        self._device = memory.device
        self._memory = PagedMemory(layout, memory)
        self.kv_scales: torch.Tensor | None = None
        if layout.fp8:
            _require_fp8(memory.device)
            self.kv_scales = no_scales(spec, memory.device)
        # Tiles are cut for what is computed in, which stored keys and values become.
        item_bytes = DTYPE_BYTES[layout.dtype]
        shape = (spec.heads, spec.kv_heads, spec.head_dim, layout.block_tokens, item_bytes)
        self._decode = DecodeShape.choose(*shape)
        self._prefill = PrefillShape.choose(*shape)
        self._windows = spec.windows_seen
        self._decode_of = {
            window: replace(self._decode, window_tokens=window) for window in self._windows
        }
        self._prefill_of = {
            window: replace(self._prefill, window_tokens=window) for window in self._windows
        }
        self._frequencies = frequencies(spec.rope, spec.head_dim).to(self._device)
        self._linear: Linear = functional.linear
        if strict:
            self._linear = of_fixed_rows(self._linear, STRICT_ROWS[self._device.type])
        self._programs = _programs(self._device)
        self._scratch = Scratch.make(self._decode, 1, 1, self._device)
        self._room = (1, 1)

    def plan(self, spans: Sequence[Span], positions: torch.Tensor) -> Plan:
        parts = self.numbers(spans, positions.numpy().astype(np.int32))
        return self.plan_over(spans, self._copied(*parts))

    def numbers(self, spans: Sequence[Span], positions: Numbers) -> list[Numbers]:
        """What the device has to know of a step, in the order that `plan_over` takes it in."""
        decodes = _decodes(spans)
        tables = self._tables(spans)
        return [
            positions,
            self._cells(spans, tables, positions),
            np.array([span.start + 1 for span in spans[:decodes]], dtype=np.int32),
            tables,
            prefill_spans(spans[decodes:], decodes),
            prefill_tiles(spans[decodes:], self._prefill),
        ]

    def plan_over(self, spans: Sequence[Span], parts: Sequence[torch.Tensor]) -> Plan:
        """The plan of a step whose `numbers` are on the device, each aligned to 16 bytes."""
        positions, cells, lengths, tables, chunks, tiles = parts
        decodes = _decodes(spans)
        work = {}
        if decodes:
            tokens = sum(span.start + 1 for span in spans[:decodes])
            for window in self._windows:
                room = items_max(decodes, tokens, self._decode.split_tokens, window)
                items = torch.empty((room, 2), dtype=torch.int32, device=self._device)
                work[window] = self._list(lengths, items, window)
                self._make_room(room, decodes)
        angles = rotary_angles(positions, self._frequencies)
        return Plan(angles, cells, decodes, lengths, work, tables, chunks, tiles, self._scratch)

    def reserve_decodes(
        self,
        sequences: int,
        tokens: int,
        scratch_bytes_max: int,
        workspace: Workspace | None = None,
    ) -> Reserved:
        """Memory for plans of decodes alone, which stays where it is: of at most `sequences` that
        hold `tokens` tokens together, or of as many as `scratch_bytes_max` are enough for. What
        they leave for each other within a step is in `workspace`."""
        shape = self._decode
        item_bytes = 4 * shape.heads * (shape.head_dim + 2)
        most = {
            window: items_max(sequences, tokens, shape.split_tokens, window)
            for window in self._windows
        }
        room = max(sequences, min(max(most.values()), scratch_bytes_max // item_bytes))
        return Reserved(
            {
                window: torch.empty((min(items, room), 2), dtype=torch.int32, device=self._device)
                for window, items in most.items()
            },
            Scratch.make(shape, room, sequences, self._device, workspace),
            shape.split_tokens,
        )

    def plan_decodes(
        self,
        positions: torch.Tensor,
        cells: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        reserved: Reserved,
    ) -> Plan:
        """The plan of decodes alone, all [sequences]; nothing of it is known to the host, so it can
        be captured. A length of 0 with a cell of -1 is no sequence: it fills a batch."""
        none = torch.empty((0, 2), dtype=torch.int32, device=self._device)
        return Plan(
            angles=rotary_angles(positions, self._frequencies),
            cells=cells,
            decodes=len(lengths),
            lengths=lengths,
            work={
                window: self._list(lengths, items, window)
                for window, items in reserved.items.items()
            },
            tables=tables,
            chunks=none,
            tiles=none,
            scratch=reserved.scratch,
        )

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._linear(rows, weight, bias)

    def add_rms_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return add_rms_norm(rows, residual, weight, epsilon)

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated_activation(gate_up)

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, norms: NormWeights | None, epsilon: float, plan: Plan
    ) -> torch.Tensor:
        memory, heads = self._memory.flat, self._spec.heads
        return rotate_and_store(
            qkv,
            norms,
            epsilon,
            plan.angles,
            plan.cells,
            memory,
            self._layout,
            layer,
            heads,
            self._scales_of(layer),
        )

    def attend(self, layer: int, queries: torch.Tensor, plan: Plan) -> torch.Tensor:
        tokens, heads, dim = queries.shape
        output = torch.empty((tokens, heads * dim), dtype=queries.dtype, device=queries.device)
        window = self._spec.window_of(layer)
        if plan.decodes:
            attention_decode(
                queries,
                output,
                self._memory,
                layer,
                plan.tables,
                plan.lengths,
                plan.work[window].items,
                plan.work[window].firsts,
                plan.scratch,
                self._decode_of[window],
                programs=self._programs,
                scales=self._scales_of(layer),
            )
        if len(plan.tiles):
            tables = plan.tables[plan.decodes :]
            attention_prefill(
                queries,
                output,
                self._memory,
                layer,
                tables,
                plan.chunks,
                plan.tiles,
                self._prefill_of[window],
                scales=self._scales_of(layer),
            )
        return output

    def _scales_of(self, layer: int) -> torch.Tensor | None:
        return None if self.kv_scales is None else self.kv_scales[layer]

    def _list(self, lengths: torch.Tensor, items: torch.Tensor, window: int) -> Work:
        firsts = torch.empty(len(lengths) + 1, dtype=torch.int32, device=self._device)
        split = self._decode.split_tokens
        list_work(lengths, items, firsts, split_tokens=split, window_tokens=window)
        return Work(items, firsts)

    def _tables(self, spans: Sequence[Span]) -> Numbers:
        """[spans, blocks]; entries beyond a span's end are never read."""
        counts = [self._layout.blocks_for(span.start + span.count) for span in spans]
        tables = np.zeros((len(spans), max(counts)), dtype=np.int32)
        for row, span, count in zip(tables, spans, counts, strict=True):
            row[:count] = span.blocks[:count]
        return tables

    def _cells(self, spans: Sequence[Span], tables: Numbers, positions: Numbers) -> Numbers:
        """Where each token's keys and values go, block * block_tokens + slot."""
        slots = self._layout.block_tokens
        owner = np.repeat(np.arange(len(spans)), [span.count for span in spans])
        blocks = tables[owner, positions // slots].astype(np.int32)
        return blocks * np.int32(slots) + positions % np.int32(slots)

    def _copied(self, *parts: Numbers) -> list[torch.Tensor]:
        """The parts on the device, in their shapes, by one copy."""
        ends = np.cumsum([-(-part.size // PART_ITEMS) * PART_ITEMS for part in parts])
        whole = np.zeros(int(ends[-1]), dtype=np.int32)
        begins = [0, *ends[:-1].tolist()]
        for part, begin in zip(parts, begins, strict=True):
            whole[begin : begin + part.size] = part.reshape(-1)
        there = placed(torch.from_numpy(whole), self._device)
        return [
            there[begin : begin + part.size].view(part.shape)
            for part, begin in zip(parts, begins, strict=True)
        ]

    def _make_room(self, items: int, sequences: int) -> None:
        """Scratch for so much, at least doubled each time it grows."""
        if items <= self._room[0] and sequences <= self._room[1]:
            return
        self._room = (max(items, 2 * self._room[0]), max(sequences, 2 * self._room[1]))
        self._scratch = Scratch.make(self._decode, *self._room, self._device)


def _decodes(spans: Sequence[Span]) -> int:
    return sum(span.count == 1 for span in spans)


def _programs(device: torch.device) -> int:
    """Programs that run at once, counted where the process runs: a slice has fewer."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return RESIDENT_PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _require_fp8(device: torch.device) -> None:
    """Raise DeviceUnsuitable for a GPU that does not convert FP8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        major, minor = capability
        raise DeviceUnsuitable(
            f"keys and values cannot be stored as FP8 on a GPU of compute capability "
            f"{major}.{minor}, which does not convert it; it takes {FP8_CAPABILITY[0]}."
            f'{FP8_CAPABILITY[1]}: set kv_dtype = "auto"',
            capability=f"{major}.{minor}",
        )
