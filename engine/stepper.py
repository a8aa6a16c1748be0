"""How a planned step is computed: begun on a device, and its draws collected later.

Owns the Protocol and the stepper that computes at once and draws tokens on the host, which is what
serves on the processor. It never decides what is computed and never changes a request. Invariant: a
stepper that overlaps has at most one step begun and not collected when another is launched, and
collects them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from engine.device_tensors import placed
from engine.kernels.protocol import Kernels, Span
from engine.kernels.strict import single_tokens
from engine.kv_layout import KvLayout
from engine.limits import EngineLimits
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.request import Request
from engine.sampler import Draw, sample
from engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class StepperStatistics:
    """What a stepper did since it was made; nothing of it where there are no graphs."""

    graphs: int = 0
    """Captured now."""
    replays: int = 0
    capture_s: float = 0.0
    """Time spent on capturing."""
    graph_bytes: int = 0
    """Memory that the graphs captured now brought to the pool of their worker."""


class Stepper(Protocol):
    """Computes the steps of one engine."""

    @property
    def kernels(self) -> Kernels:
        """What decoders compute with."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the one before it is collected. Tokens that are
        not known by then are UNDRAWN in their requests, and taken from that step's draws."""

    @property
    def statistics(self) -> StepperStatistics:
        """What it did."""

    def launch(self, decoder: Decoder, chunks: Sequence[Chunk], *, steady: bool) -> Any:
        """Begin to compute; returns what `collect` wants. Nothing of the requests is changed.

        `steady` says that the decoder's weights are all there and stay where they are.
        """

    def collect(self, launched: Any) -> list[Draw]:
        """Wait for a step; draws are those of the chunks that draw, in order."""


MakeStepper = Callable[[ModelSpec, KvLayout, torch.Tensor, EngineLimits], Stepper]
"""Makes an engine's stepper, whose KV memory is given as uint8."""


class HostStepper:
    """Computes at once; logits are brought to the host and tokens drawn there."""

    overlaps = False
    statistics = StepperStatistics()

    def __init__(self, kernels: Kernels, device: torch.device, *, strict: bool = False) -> None:
        self.kernels = kernels
        self._strict = strict
        self._device = device

    @torch.inference_mode()
    def launch(self, decoder: Decoder, chunks: Sequence[Chunk], *, steady: bool) -> list[Draw]:
        spans = spans_of(chunks, strict=self._strict)
        counts = np.array([chunk.count for chunk in chunks])
        ends = np.cumsum(counts)
        starts = np.array([chunk.start for chunk in chunks])
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.request.tokens[chunk.start : chunk.end]
        plan = self.kernels.plan(spans, torch.from_numpy(positions))
        drawing = [index for index, chunk in enumerate(chunks) if chunk.draws]
        rows = placed(torch.from_numpy(ends[np.array(drawing, dtype=np.int64)] - 1), self._device)
        logits = decoder.forward(placed(torch.tensor(tokens), self._device), plan, rows)
        return sample(logits, [chunks[index].request for index in drawing])

    def collect(self, launched: list[Draw]) -> list[Draw]:
        return launched


def spans_of(chunks: Sequence[Chunk], *, strict: bool) -> list[Span]:
    """What kernels are to compute; token by token where results must not depend on chunks."""
    spans = [Span(chunk.start, chunk.count, chunk.request.blocks) for chunk in chunks]
    return single_tokens(spans) if strict else spans


def drawing_requests(chunks: Sequence[Chunk]) -> list[Request]:
    """The requests that draw in a step, in its order."""
    return [chunk.request for chunk in chunks if chunk.draws]
