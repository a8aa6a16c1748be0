"""Sampling on the device: the launches, and the memory between them.

Owns the buffers of one engine's sampler, but for those it is lent, and the order of its kernels.
It never waits for the device and never reads from it: the host copies `results` when it wants them.
Invariant: no launch depends on a value that the host put anywhere but into the row buffer, so
captured launches draw for whatever rows it holds when they are replayed.
"""

from __future__ import annotations

import numpy as np
import torch
import triton

from engine.kernels.triton import sampling_adjust, sampling_finish, sampling_likeliest
from engine.kernels.triton.sampling_adjust import sampling_adjust_kernel
from engine.kernels.triton.sampling_collect import sampling_collect_kernel
from engine.kernels.triton.sampling_finish import sampling_finish_kernel
from engine.kernels.triton.sampling_likeliest import (
    likeliest_of_chunks_kernel,
    likeliest_of_rows_kernel,
)
from engine.kernels.triton.sampling_measure import TILE as MEASURE_TILE
from engine.kernels.triton.sampling_measure import sampling_measure_kernel
from engine.kernels.triton.sampling_parts import CANDIDATES, CHUNK, LADDER, VOCABULARY_MAX
from engine.link.tokens import LOGPROBS_MAX, TokenLogprob
from engine.sampler import Draw
from engine.sampling_rows import Kind, RowBuffer
from engine.workspace import Workspace


class DeviceSampler:
    """Draws tokens of up to `rows_max` rows of logits.

        sampler = DeviceSampler(vocabulary, rows_max=256, device=device)
        kind = buffer.pack(requests, vocabulary)
        sampler.take(buffer)
        sampler.launch(logits, rows=len(requests), kind=kind)
        draws = sampler.draws(sampler.results.cpu(), buffer, len(requests))

    Two launches for greedy rows, three for draws, four for filtered ones, and two more for the
    likeliest tokens. Memory: 4 * rows_max * vocabulary bytes of the workspace for the logits that
    are drawn from, as much of its own for each row of which it counts what occurred, and little
    else. The candidates, chunks and tiles are those the kernels were measured with; tests make them
    small.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        rows_max: int,
        device: torch.device,
        packed: torch.Tensor | None = None,
        workspace: Workspace | None = None,
        chunk: int = CHUNK,
        candidates: int = CANDIDATES,
    ) -> None:
        assert vocabulary <= VOCABULARY_MAX, f"vocabularies end at {VOCABULARY_MAX} tokens"
        self.vocabulary = vocabulary
        self._chunk, self._candidates = chunk, candidates
        self._chunks = chunks = triton.cdiv(vocabulary, chunk)
        buffer = RowBuffer(rows_max)
        self._edits_start = buffer.edits_start

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        workspace = workspace or Workspace()

        def lent(purpose: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return workspace.lend(f"sampling: {purpose}", *shape, dtype=dtype, device=device)

        whole = torch.int32
        if packed is None:
            packed = torch.zeros(buffer.bytes.size, dtype=torch.uint8, device=device)
        self.packed = packed
        """What `RowBuffer.bytes` is copied to."""
        self.occurrences = torch.zeros((1, vocabulary), dtype=whole, device=device)
        """Rows of `occurrences_of`, written when a penalised request begins or comes back; from
        then on each draw counts itself. The first is there for rows that are not penalised, whose
        number is 0 too, until somebody is."""
        self.results = empty(rows_max, 2, dtype=whole)
        """Token, or -1 for a row that has none, and bits of its log probability."""
        self.tokens = torch.zeros(rows_max, dtype=torch.int64, device=device)
        """Drawn tokens as the next step's input."""
        self.likeliest = empty(rows_max, LOGPROBS_MAX, 2, dtype=whole)
        """Tokens and bits of log probabilities, likeliest first, as many as the row asked for."""
        self._scaled = lent("scaled", rows_max, vocabulary)
        self._raw_peaks = lent("raw peaks", rows_max, chunks)
        self._raw_sums = lent("raw sums", rows_max, chunks)
        self._peaks = lent("peaks", rows_max, chunks)
        self._best = lent("best", rows_max, chunks, dtype=whole)
        self._masses = lent("masses", rows_max, chunks, dtype=torch.int64)
        self._step_counts = lent("step counts", rows_max, chunks, LADDER, dtype=whole)
        self._step_masses = lent("step masses", rows_max, chunks, LADDER)
        self._listed = lent("listed", rows_max, dtype=whole)
        self._listed_values = lent("listed values", rows_max, candidates)
        self._listed_tokens = lent("listed tokens", rows_max, candidates, dtype=whole)
        self._chunk_likeliest = lent("likeliest", rows_max, chunks, LOGPROBS_MAX, 2, dtype=whole)

    def count_occurrences(self, rows: int) -> None:
        """Have `rows` rows for penalised requests, elsewhere: captured launches are void."""
        before = self.occurrences
        self.occurrences = before.new_zeros((rows, self.vocabulary))
        self.occurrences[: len(before)].copy_(before)

    def take(self, buffer: RowBuffer) -> None:
        """Copy the rows to the device, those bytes alone that are used."""
        used = torch.from_numpy(buffer.bytes[: buffer.used_bytes])
        self.packed[: buffer.used_bytes].copy_(used, non_blocking=True)

    def launch(
        self,
        logits: torch.Tensor,
        *,
        rows: int,
        kind: Kind = Kind.FILTERED,
        likeliest: bool = False,
    ) -> None:
        """Draw for the first `rows` rows of `logits` [rows or more, vocabulary].

        `kind` is the costliest among them, which `RowBuffer.pack` returns: a graph that is captured
        with one also serves cheaper rows. `likeliest` reports other tokens' log probabilities too.
        """
        assert logits.shape[1] == self.vocabulary
        assert logits.stride(1) == 1
        assert rows <= len(self.results)
        self._adjust(logits, rows)
        if kind >= Kind.RANDOM:
            self._measure(rows)
        if kind >= Kind.FILTERED:
            self._collect(rows)
        self._finish(logits, rows)
        if likeliest:
            self._report(logits, rows)

    @staticmethod
    def draws(
        results: torch.Tensor,
        buffer: RowBuffer,
        requests: int,
        likeliest: torch.Tensor | None = None,
    ) -> list[Draw]:
        """What `results`, and `likeliest` where some row asked for it, say, both on the host."""
        tokens = results[:requests, 0].tolist()
        logprobs = results[:requests, 1].contiguous().view(torch.float32).tolist()
        draws = []
        for row, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            count = int(buffer.rows["likeliest"][row])
            top: tuple[tuple[int, float], ...] = ()
            if count and likeliest is not None:
                own = likeliest[row, :count].numpy()
                values = np.ascontiguousarray(own[:, 1]).view(np.float32)
                top = tuple(zip(own[:, 0].tolist(), values.tolist(), strict=True))
            valid = token >= 0
            draws.append(Draw(token, TokenLogprob(logprob, top)) if valid else Draw(None))
        return draws

    def _adjust(self, logits: torch.Tensor, rows: int) -> None:
        sampling_adjust_kernel[(self._chunks, rows)](
            logits,
            self.packed,
            self.packed[self._edits_start :].view(torch.int32),
            self.occurrences,
            self._scaled,
            self._raw_peaks,
            self._raw_sums,
            self._peaks,
            self._best,
            logits.stride(0),
            self.vocabulary,
            self._chunks,
            CHUNK=self._chunk,
            EDITS_AT_ONCE=sampling_adjust.EDITS_AT_ONCE,
            enable_fp_fusion=False,
        )

    def _measure(self, rows: int) -> None:
        sampling_measure_kernel[(self._chunks, rows)](
            self.packed,
            self._scaled,
            self._peaks,
            self._masses,
            self._step_counts,
            self._step_masses,
            self.vocabulary,
            self._chunks,
            CHUNK=self._chunk,
            CHUNKS=triton.next_power_of_2(self._chunks),
            LADDER=LADDER,
            TILE=min(MEASURE_TILE, self._chunk),
        )

    def _collect(self, rows: int) -> None:
        sampling_collect_kernel[(self._chunks, rows)](
            self.packed,
            self._scaled,
            self._peaks,
            self._masses,
            self._step_counts,
            self._step_masses,
            self._listed,
            self._listed_values,
            self._listed_tokens,
            self.vocabulary,
            self._chunks,
            CHUNK=self._chunk,
            CHUNKS=triton.next_power_of_2(self._chunks),
            LADDER=LADDER,
            CANDIDATES=self._candidates,
        )

    def _finish(self, logits: torch.Tensor, rows: int) -> None:
        sampling_finish_kernel[(rows,)](
            logits,
            self.packed,
            self.occurrences,
            self._scaled,
            self._raw_peaks,
            self._raw_sums,
            self._peaks,
            self._best,
            self._masses,
            self._listed,
            self._listed_values,
            self._listed_tokens,
            self.results,
            self.tokens,
            logits.stride(0),
            self.vocabulary,
            self._chunks,
            CHUNK=self._chunk,
            CHUNKS=triton.next_power_of_2(self._chunks),
            CANDIDATES=self._candidates,
            TILE=sampling_finish.TILE,
            num_warps=8,
        )

    def _report(self, logits: torch.Tensor, rows: int) -> None:
        likeliest_of_chunks_kernel[(self._chunks, rows)](
            logits,
            self.packed,
            self._chunk_likeliest,
            logits.stride(0),
            self.vocabulary,
            self._chunks,
            CHUNK=self._chunk,
            LIKELIEST_MAX=LOGPROBS_MAX,
        )
        likeliest_of_rows_kernel[(rows,)](
            self.packed,
            self._chunk_likeliest,
            self._raw_peaks,
            self._raw_sums,
            self.likeliest,
            self._chunks,
            CHUNKS=triton.next_power_of_2(self._chunks),
            LIKELIEST_MAX=LOGPROBS_MAX,
            PADDED=sampling_likeliest.PADDED,
            num_warps=8,
        )
