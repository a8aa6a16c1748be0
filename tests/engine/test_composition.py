"""The same tokens in every way of the table, and the same bits from strict engines, on the host.

Without `strict` the table must show differences, or it would compare nothing that can differ.
Engines with Triton's kernels, captured and not: `interpreted/test_composition.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from engine.kernels.choose import choose_kernels
from engine.kv_layout import KvLayout
from engine.models.decoder import Decoder
from engine.request import Request
from engine.sampler import Draw
from engine.scheduler import Chunk
from engine.stepper import HostStepper, MakeStepper, drawing_requests
from tests.engine.checkpoints import Checkpoint, prompt
from tests.engine.composition import WAYS, Kind, Noted, check

Make = Callable[[str], Checkpoint]
NEW_TOKENS = 6
CONTEXT = 120
PAGE_BYTES = 1 << 13


class NotingDecoder:
    """A decoder whose logits are noted as they come."""

    def __init__(self, decoder: Decoder, noted: Noted, requests: Sequence[Request]) -> None:
        self._decoder, self._noted, self._requests = decoder, noted, requests

    def forward(self, *inputs: Any) -> torch.Tensor:
        logits = self._decoder.forward(*inputs)
        self._noted.note(logits, self._requests)
        return logits


class NotingStepper(HostStepper):
    """The host's way, watched."""

    noted: Noted

    def launch(self, decoder: Decoder, chunks: Sequence[Chunk], *, steady: bool) -> list[Draw]:
        watched: Any = NotingDecoder(decoder, self.noted, drawing_requests(chunks))
        return super().launch(watched, chunks, steady=steady)


def noting(noted: Noted) -> dict[str, MakeStepper]:
    def make(spec: Any, layout: Any, memory: Any, limits: Any) -> NotingStepper:
        kernels = choose_kernels(spec, layout, memory, strict=limits.strict)
        stepper = NotingStepper(kernels, memory.device, strict=limits.strict)
        stepper.noted = noted
        return stepper

    return {"make_stepper": make}


def kind_of(made: Checkpoint, *, strict: bool) -> Kind:
    return Kind(
        made.spec,
        made.weights,
        probe=prompt(7, 45),
        others=[prompt(200 + index, 1 + 7 * index % 60) for index in range(63)],
        rival=prompt(9, 100),
        new_tokens=NEW_TOKENS,
        others_tokens=NEW_TOKENS,
        page_bytes=PAGE_BYTES,
        pages=1500,
        pages_few=KvLayout.choose(made.spec, "float32", PAGE_BYTES).pages_for(CONTEXT),
        context_tokens=CONTEXT,
        chunk_tokens=20,
        strict=strict,
        given=noting,
    )


@pytest.mark.parametrize("shape", ["llama", "qwen3", "mistral-window"])
def test_strict_engines_bring_the_same_bits(shape: str, checkpoint: Make) -> None:
    kind = kind_of(checkpoint(shape), strict=True)
    expected = checkpoint(shape).greedy(kind.probe, NEW_TOKENS)
    alone = check(kind, "alone", expected)
    for name in WAYS:
        check(kind, name, expected, alone)


def test_others_bring_the_same_tokens_and_other_bits(checkpoint: Make) -> None:
    kind = kind_of(checkpoint("llama"), strict=False)
    expected = checkpoint("llama").greedy(kind.probe, NEW_TOKENS)
    alone = check(kind, "alone", expected)
    assert sum(alone.differing(check(kind, name, expected)) for name in WAYS) > 0
