"""Logits of every family against transformers' own, within 1e-4 in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels.protocol import Span
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kernels.reference.rotary import frequencies
from engine.kv_layout import KvLayout
from engine.models.decoder import Decoder, OpenGate
from tests.engine.checkpoints import PAGE_BYTES, SHAPES, Checkpoint, prompt

TOLERANCE = 1e-4
Make = Callable[[str], Checkpoint]


class Gate:
    """A gate that writes down who waited."""

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait(self, layer: int) -> None:
        self.waited.append(layer)


def logits_in_chunks(made: Checkpoint, tokens: list[int], sizes: list[int]) -> torch.Tensor:
    """Logits after every token, computed chunk by chunk over one cache."""
    layout = KvLayout.choose(made.spec, "float32", PAGE_BYTES)
    memory = torch.full((64 * layout.page_elements,), float("nan")).view(torch.uint8)
    kernels = ReferenceKernels(made.spec, layout, memory)
    decoder = Decoder(made.spec, made.weights, kernels, OpenGate())
    blocks = [3 * block % 61 for block in range(layout.blocks_for(len(tokens)))]
    parts, start = [], 0
    with torch.inference_mode():
        for size in sizes:
            positions = torch.arange(start, start + size)
            plan = kernels.plan([Span(start, size, blocks)], positions)
            chunk = torch.tensor(tokens[start : start + size])
            parts.append(decoder.forward(chunk, plan, torch.arange(size)))
            start += size
    assert start == len(tokens)
    return torch.cat(parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_prefill_chunks_and_decodes(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    tokens = prompt(11, 90)
    expected = made.logits(tokens)
    assert expected.std() > 0.5, "a model that says nothing tests nothing"
    for sizes in ([90], [33, 32, 25], [1] * 5 + [60] + [1] * 25):
        found = logits_in_chunks(made, tokens, sizes)
        assert (found - expected).abs().max() < TOLERANCE, sizes[0]


def test_layers_are_waited_for_in_the_order_they_land(checkpoint: Make) -> None:
    made = checkpoint("llama")
    layout = KvLayout.choose(made.spec, "float32", PAGE_BYTES)
    kernels = ReferenceKernels(made.spec, layout, torch.zeros(4 * PAGE_BYTES, dtype=torch.uint8))
    gate = Gate()
    decoder = Decoder(made.spec, made.weights, kernels, gate)
    assert gate.waited == [], "weights are not touched before they are used"
    plan = kernels.plan([Span(0, 2, [0])], torch.arange(2))
    with torch.inference_mode():
        decoder.forward(torch.tensor([1, 2]), plan, torch.tensor([1]))
    assert gate.waited == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("shape", ["llama", "llama-tied-llama3"])
def test_rotary_frequencies_are_transformers_own(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    own = frequencies(made.spec.rope, made.spec.head_dim)
    torch.testing.assert_close(own, made.oracle.model.rotary_emb.inv_freq)
