"""A whole tiny model through the Triton operations, held to the reference; its launches counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from engine.kernels.protocol import Kernels, Span
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kernels.triton.kernels import TritonKernels
from engine.kv_layout import KvLayout
from engine.models.decoder import Decoder, OpenGate
from engine.models.layout import image_recipes
from engine.models.spec import Family, ModelSpec, Rope

PAGE_BYTES = 1 << 16
PAGES = 24
LAUNCHES_PER_LAYER_MAX = 10
LAYERS = 2
# Steps of (sequence, start, count): prompts in chunks, chunks beside decodes, decodes alone. The
# last sequence is longer than a split.
STEPS = [
    [(0, 0, 5), (1, 0, 33)],
    [(0, 5, 1), (1, 33, 7), (2, 0, 257)],
    [(0, 6, 1), (1, 40, 1), (2, 257, 1)],
]


def spec_of(family: Family, windows: tuple[int, ...] = ()) -> ModelSpec:
    return ModelSpec(
        family=family,
        layers=LAYERS,
        hidden=48,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=80,
        vocabulary=61,
        context_tokens=512,
        tied=True,
        norm_epsilon=1e-6,
        rope=Rope(1e4),
        eos_token_ids=(),
        windows=windows,
    )


def weights_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        recipe.name: torch.randn(recipe.shape, generator=generator) * 0.2
        + (1.0 if "norm" in recipe.name else 0.0)
        for recipe in image_recipes(spec)
    }


def run(spec: ModelSpec, kernels: Kernels, sequences: int) -> list[torch.Tensor]:
    decoder = Decoder(spec, weights_of(spec), kernels, OpenGate())
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in (1, 2, 9)]
    logits = []
    for step in STEPS:
        step = sorted(
            (own for own in step if own[0] < sequences), key=lambda own: (own[2], own[1] + own[2])
        )
        spans = [Span(start, count, tables[sequence]) for sequence, start, count in step]
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in step])
        tokens = (positions * 7 + 3) % spec.vocabulary
        with torch.inference_mode():
            plan = kernels.plan(spans, positions)
            logits.append(decoder.forward(tokens, plan, torch.arange(len(tokens))))
    return logits


def stage(
    family: Family, windows: tuple[int, ...] = (), *, fp8: bool = False
) -> tuple[ModelSpec, KvLayout, torch.Tensor]:
    spec = spec_of(family, windows)
    layout = KvLayout.choose(spec, "float32", PAGE_BYTES, fp8=fp8)
    # Ones in all bits are no number, as float32 and as FP8.
    memory = torch.full((PAGES * PAGE_BYTES,), 0xFF, dtype=torch.uint8)
    assert PAGES * layout.blocks_per_page >= 40
    return spec, layout, memory


@pytest.mark.parametrize(
    ("family", "sequences", "windows"),
    [
        ("llama", 2, ()),
        ("qwen2", 2, ()),
        ("qwen3", 3, ()),
        ("mistral", 2, (7, 7)),
        ("qwen2", 2, (0, 7)),
    ],
)
def test_a_model_says_the_same_as_over_the_reference(
    family: Family, sequences: int, windows: tuple[int, ...]
) -> None:
    spec, layout, memory = stage(family, windows)
    found = run(spec, TritonKernels(spec, layout, memory.clone()), sequences)
    wanted = run(spec, ReferenceKernels(spec, layout, memory.clone()), sequences)
    for mine, theirs in zip(found, wanted, strict=True):
        assert theirs.std() > 0.1, "a model that says nothing tests nothing"
        assert (mine - theirs).abs().max() < 1e-4


def test_over_fp8_it_says_the_same_as_the_reference() -> None:
    """But where a number lies between two of FP8's, and either may be taken."""
    family, windows = "qwen3", (7, 0)
    spec, layout, memory = stage(family, windows, fp8=True)
    found = run(spec, TritonKernels(spec, layout, memory.clone()), 2)
    wanted = run(spec, ReferenceKernels(spec, layout, memory.clone()), 2)
    plain_spec, plain_layout, plain_memory = stage(family, windows)
    plain = run(plain_spec, ReferenceKernels(plain_spec, plain_layout, plain_memory), 2)
    for mine, theirs, own in zip(found, wanted, plain, strict=True):
        lost = (theirs - own).abs().mean()
        assert lost > 1e-3, "nothing was rounded"
        assert (mine - theirs).abs().mean() < lost / 20


class Counting(TritonKernels):
    """Counts matrix products, each a launch, beside the kernels' own."""

    products = 0

    def linear(self, *arguments: Any) -> torch.Tensor:
        self.products += 1
        return super().linear(*arguments)


def test_a_layer_is_at_most_ten_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that has both kinds of attention; norms of the last layer and the output besides."""
    spec, layout, memory = stage("qwen3")
    launched: Counter[str] = Counter()
    before = GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        launched[self.fn.__name__] += 1
        return before(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    kernels = Counting(spec, layout, memory.zero_())
    plan = kernels.plan([Span(4, 1, [1]), Span(0, 3, [0])], torch.tensor([4, 0, 1, 2]))
    launched.clear()
    decoder = Decoder(spec, weights_of(spec), kernels, OpenGate())
    with torch.inference_mode():
        decoder.forward(torch.arange(4), plan, torch.arange(4))
    assert launched["attention_decode_kernel"] == LAYERS
    assert launched["attention_prefill_kernel"] == LAYERS
    outside = 2  # the last norm and the output's product
    total = sum(launched.values()) + kernels.products - outside
    assert 0 < total <= LAUNCHES_PER_LAYER_MAX * LAYERS, launched
