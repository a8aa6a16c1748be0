"""Steps on a device that is told all of a step in one copy, and answers with tokens alone.

Owns the order in which a step is begun (inputs, model, sampler, the way back), which batches are
captured as graphs, and the memory that stays between steps. It never waits but in `collect`, and
there for the step asked for. Invariants: whatever a graph touches stays where it was for as long as
the stepper lives, or the graph is dropped; a step computes the same whether it is replayed or
launched kernel by kernel, padded or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.graphs import Graph, Graphs, buckets_up_to
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.sampling import DeviceSampler
from engine.kernels.triton.step_numbers import step_tables, step_tokens
from engine.kv_layout import KvLayout
from engine.limits import EngineLimits
from engine.link.tokens import LOGPROBS_MAX
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.request import UNDRAWN, Request
from engine.sampler import Draw
from engine.sampling_rows import Kind, RowBuffer, is_penalised, occurrences_of
from engine.scheduler import Chunk
from engine.step_inputs import HOST_BUFFERS, StepInputs
from engine.stepper import StepperStatistics, drawing_requests, spans_of
from engine.workspace import Workspace

Numbers = npt.NDArray[np.int32]

SCRATCH_BYTES_MAX = 64 << 20
"""What splits of long sequences leave for each other in graphs; batches that need more are launched
kernel by kernel, in memory of their own."""
TILES_NUMBERS = 8
"""Numbers that a token of a step takes at most, besides its block table."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was begun."""

    requests: Sequence[Request]
    """Those that draw, row by row."""
    rows: RowBuffer
    results: torch.Tensor
    likeliest: torch.Tensor | None
    done: torch.cuda.Event | None


class DeviceStepper:
    """See `engine.stepper.Stepper`; without `graphs` nothing is captured. Engines whose steps are
    computed one after another may share `graphs` and `workspace`."""

    overlaps = True

    def __init__(
        self,
        spec: ModelSpec,
        layout: KvLayout,
        memory: torch.Tensor,
        limits: EngineLimits,
        graphs: Graphs | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.kernels = TritonKernels(spec, layout, memory, strict=limits.strict)
        self._strict = limits.strict
        self._device = device = memory.device
        workspace = workspace or Workspace()
        self._layout, self._vocabulary = layout, spec.vocabulary
        self._graphs = graphs
        self._buckets = buckets_up_to(limits.running_requests_max)
        self._rows_max = rows_max = max(limits.running_requests_max, self._buckets[-1])
        width = layout.blocks_for(limits.context_tokens)
        # In a strict engine every token has a table of its own.
        tables_max = max(rows_max, limits.step_tokens if limits.strict else 0)
        numbers_max = tables_max * (width + 4) + TILES_NUMBERS * (limits.step_tokens + rows_max)
        self._inputs = StepInputs(rows_max, numbers_max, device)
        self._sampler = DeviceSampler(
            spec.vocabulary,
            rows_max=rows_max,
            device=device,
            packed=self._inputs.sampled,
            workspace=workspace,
        )
        self._occurring: dict[Request, int] = {}
        """Rows of the table of occurrences, which the device keeps from step to step."""
        self._last: dict[Request, int] = {}
        """Which row of the last step drew for whom."""
        self._tables = torch.zeros((rows_max, width), dtype=torch.int32, device=device)
        in_kv = layout.block_tokens * layout.blocks_per_page * (memory.numel() // layout.page_bytes)
        self._reserved = self.kernels.reserve_decodes(
            rows_max,
            min(in_kv, rows_max * limits.context_tokens),
            SCRATCH_BYTES_MAX,
            workspace,
        )
        pinned = device.type == "cuda"
        self._results = [
            torch.zeros((rows_max, 2), dtype=torch.int32, pin_memory=pinned)
            for _ in range(HOST_BUFFERS)
        ]
        self._likeliest = [
            torch.zeros((rows_max, LOGPROBS_MAX, 2), dtype=torch.int32, pin_memory=pinned)
            for _ in range(HOST_BUFFERS)
        ]
        self._turn = 0
        self._captured: dict[tuple[int, bool], Graph] = {}
        self._warm: set[tuple[int, bool]] = set()
        self._weights: tuple[int, ...] = ()
        """Addresses of the weights that graphs were captured with."""
        self._replays = 0
        self._capture_s = 0.0

    @property
    def inputs(self) -> StepInputs:
        """What goes to the device, for its figures."""
        return self._inputs

    @property
    def statistics(self) -> StepperStatistics:
        graph_bytes = sum(graph.size_bytes for graph in self._captured.values())
        return StepperStatistics(len(self._captured), self._replays, self._capture_s, graph_bytes)

    @torch.inference_mode()
    def launch(self, decoder: Decoder, chunks: Sequence[Chunk], *, steady: bool) -> Launched:
        requests = drawing_requests(chunks)
        inputs = self._inputs
        inputs.begin()
        places = self._place_occurrences(requests)
        kind = inputs.sampling.pack(requests, self._vocabulary, places)
        likeliest = bool(inputs.sampling.rows["likeliest"][: len(requests)].any())
        rows = self._bucket(chunks) if steady and self._graphs is not None else None
        if rows is None:
            self._launch_apart(decoder, chunks, requests, kind, likeliest)
        else:
            self._launch_decodes(decoder, chunks, rows, likeliest)
        self._last = {request: row for row, request in enumerate(requests)}
        return self._send_back(requests, inputs.sampling, likeliest)

    def collect(self, launched: Launched) -> list[Draw]:
        if launched.done is not None:
            launched.done.synchronize()
        draws = self._sampler.draws(
            launched.results, launched.rows, len(launched.requests), launched.likeliest
        )
        return [
            Draw(draw.token, draw.logprob if request.sampling.logprobs is not None else None)
            for draw, request in zip(draws, launched.requests, strict=True)
        ]

    # Kernel by kernel.

    def _launch_apart(
        self,
        decoder: Decoder,
        chunks: Sequence[Chunk],
        requests: Sequence[Request],
        kind: Kind,
        likeliest: bool,
    ) -> None:
        spans = spans_of(chunks, strict=self._strict)
        ends = np.cumsum([chunk.count for chunk in chunks])
        positions = np.concatenate(
            [np.arange(span.start, span.start + span.count, dtype=np.int32) for span in spans]
        )
        wanted = np.array(
            [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.draws], np.int32
        )
        tokens = np.concatenate([self._tokens(chunk) for chunk in chunks])
        inputs = self._inputs
        places = inputs.add([tokens, wanted, *self.kernels.numbers(spans, positions)])
        inputs.send()
        sent, rows, *parts = inputs.parts(places)
        plan = self.kernels.plan_over(spans, parts)
        logits = decoder.forward(step_tokens(sent, self._sampler.tokens), plan, rows)
        if requests:
            self._sampler.launch(logits, rows=len(requests), kind=kind, likeliest=likeliest)

    def _tokens(self, chunk: Chunk) -> Numbers:
        """A chunk's tokens; one that only the device knows is -1 less the row that drew it."""
        tokens = np.array(chunk.request.tokens[chunk.start : chunk.end], dtype=np.int32)
        if tokens[-1] == UNDRAWN:
            tokens[-1] = -1 - self._last[chunk.request]
        return tokens

    # Graphs.

    def _bucket(self, chunks: Sequence[Chunk]) -> int | None:
        """Rows of the graph for a step, if it is one of decodes that a graph has room for."""
        if any(chunk.count != 1 or not chunk.draws for chunk in chunks):
            return None
        rows = next((bucket for bucket in self._buckets if bucket >= len(chunks)), None)
        if rows is None:
            return None
        lengths = np.array([chunk.end for chunk in chunks], dtype=np.int32)
        return rows if self._reserved.suffices(lengths, rows - len(chunks)) else None

    def _launch_decodes(
        self, decoder: Decoder, chunks: Sequence[Chunk], rows: int, likeliest: bool
    ) -> None:
        """Replay the graph of `rows` rows; a batch of a size that has not been seen is launched as
        it is, which makes kernels ready, and captured the next time."""
        self._pack_decodes(chunks, rows)
        self._inputs.send()
        key = (rows, likeliest)
        self._drop_moved(decoder)
        graph = self._captured.get(key)
        if graph is None:
            if key not in self._warm:
                self._warm.add(key)
                self._decode(decoder, rows, likeliest)
                return
            graph = self._capture(decoder, key)
        graph.replay()
        self._replays += 1

    def _capture(self, decoder: Decoder, key: tuple[int, bool]) -> Graph:
        assert self._graphs is not None
        started = time.monotonic()
        graph = self._graphs.capture(lambda: self._decode(decoder, *key))
        self._captured[key] = graph
        self._capture_s += time.monotonic() - started
        return graph

    def _drop_moved(self, decoder: Decoder) -> None:
        """Forget graphs if the weights are elsewhere by now, as they never are over an arena."""
        if decoder.addresses != self._weights:
            self._captured.clear()
            self._weights = decoder.addresses

    def _pack_decodes(self, chunks: Sequence[Chunk], rows: int) -> None:
        slots = self._layout.block_tokens
        positions = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        tables = [
            np.array(chunk.request.blocks[: chunk.start // slots + 1], dtype=np.int32)
            for chunk in chunks
        ]
        tokens = np.concatenate([self._tokens(chunk) for chunk in chunks])
        last = np.array([table[-1] for table in tables], dtype=np.int32)
        cells = last * np.int32(slots) + positions % np.int32(slots)
        ((begin, _),) = self._inputs.add([np.concatenate(tables)])
        counts = np.array([len(table) for table in tables], dtype=np.int32)
        starts = (begin + np.cumsum(counts) - counts).astype(np.int32)
        self._inputs.set_columns(tokens, positions, cells, starts, rows)

    def _decode(self, decoder: Decoder, rows: int, likeliest: bool) -> None:
        """Compute `rows` decodes of whatever the inputs hold: what is captured."""
        inputs, sampler = self._inputs, self._sampler
        lengths, tables = inputs.column("lengths", rows), self._tables[:rows]
        starts = inputs.column("starts", rows)
        step_tables(inputs.numbers, starts, lengths, tables, self._layout.block_tokens)
        plan = self.kernels.plan_decodes(
            inputs.column("positions", rows),
            inputs.column("cells", rows),
            lengths,
            tables,
            self._reserved,
        )
        tokens = step_tokens(inputs.column("tokens", rows), sampler.tokens)
        logits = decoder.forward(tokens, plan, None)
        sampler.launch(logits, rows=rows, kind=Kind.FILTERED, likeliest=likeliest)

    # Draws.

    def _place_occurrences(self, requests: Sequence[Request]) -> list[int]:
        """Rows in the table of occurrences; who begins or comes back has its row written."""
        penalised = [request for request in requests if is_penalised(request)]
        if not penalised and not self._occurring:
            return [0] * len(requests)
        rows = len(self._sampler.occurrences)
        if len(penalised) > rows:
            # A row is as long as the vocabulary, and few requests have penalties: made as needed.
            self._sampler.count_occurrences(min(max(2 * rows, len(penalised)), self._rows_max))
            self._captured.clear()
        kept = {one: self._occurring[one] for one in penalised if one in self._occurring}
        taken = set(kept.values())
        free = (row for row in range(len(self._sampler.occurrences)) if row not in taken)
        for request in penalised:
            if request not in kept:
                kept[request] = row = next(free)
                table = torch.from_numpy(occurrences_of(request, self._vocabulary))
                if self._device.type == "cuda":
                    table = table.pin_memory()
                self._sampler.occurrences[row].copy_(table, non_blocking=True)
        self._occurring = kept
        return [kept.get(request, 0) for request in requests]

    def _send_back(self, requests: Sequence[Request], rows: RowBuffer, likeliest: bool) -> Launched:
        """Begin to copy the draws to the host, behind the step."""
        self._turn = (self._turn + 1) % HOST_BUFFERS
        results = self._results[self._turn]
        top = self._likeliest[self._turn] if likeliest else None
        count = len(requests)
        results[:count].copy_(self._sampler.results[:count], non_blocking=True)
        if top is not None:
            top[:count].copy_(self._sampler.likeliest[:count], non_blocking=True)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Launched(requests, rows, results, top, done)
