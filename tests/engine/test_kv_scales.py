"""The scales of keys and values stored as FP8: nothing is cut off, and little is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.kernels.kv_scales import FP8_MAX, from_fp8, kv_scales, no_scales, to_fp8
from engine.kernels.reference.dense import rms_norm
from engine.models.decoder import Layer
from engine.models.spec import ModelSpec
from tests.engine.checkpoints import SHAPES, Checkpoint

Make = Callable[[str], Checkpoint]


def scales_of(spec: ModelSpec, layer: Layer) -> torch.Tensor:
    norm = layer.head_norms[1] if layer.head_norms is not None else None
    return kv_scales(spec, layer.attention_norm, layer.qkv, layer.qkv_bias, norm)


def stored_of(spec: ModelSpec, layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """Keys, turned as far as it makes them larger, and values: [rows, K and V, kv_heads, dim]."""
    hidden = rms_norm(rows, layer.attention_norm, spec.norm_epsilon)
    both = torch.nn.functional.linear(hidden, layer.qkv, layer.qkv_bias)
    both = both[:, spec.heads * spec.head_dim :].view(-1, 2, spec.kv_heads, spec.head_dim)
    keys, values = both.unbind(1)
    if layer.head_norms is not None:
        keys = rms_norm(keys, layer.head_norms[1], spec.norm_epsilon)
    half = spec.head_dim // 2
    longest = torch.hypot(keys[..., :half], keys[..., half:])
    return torch.stack((longest.repeat(1, 1, 2), values), dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_input_reaches_beyond_what_can_be_stored(shape: str, checkpoint: Make) -> None:
    """Rows that point where a row of weights does are the worst there are."""
    made = checkpoint(shape)
    spec = made.spec
    worst = torch.zeros(())
    for index in range(spec.layers):
        layer = Layer.of(spec, made.weights, index)
        scales = scales_of(spec, layer)
        assert scales.shape == (2, spec.kv_heads)
        assert torch.equal(torch.exp2(scales.log2().round()), scales), "powers of two round nothing"
        weights = layer.qkv[spec.heads * spec.head_dim :] * layer.attention_norm
        random = torch.randn(50, spec.hidden, generator=torch.Generator().manual_seed(index))
        for rows in (weights, -weights, 1e6 * weights, random):
            scaled = stored_of(spec, layer, rows).abs() / scales[None, :, :, None]
            assert scaled.max() <= FP8_MAX
            worst = torch.maximum(worst, scaled.max())
        ordinary = stored_of(spec, layer, random).abs() / scales[None, :, :, None]
        assert ordinary.median() > 2.0**-6 * 16, "far above where precision ends"
    assert worst > FP8_MAX / 4, "the bound is not idle"


def test_a_bias_counts(checkpoint: Make) -> None:
    made = checkpoint("qwen2")
    layer = Layer.of(made.spec, made.weights, 0)
    assert layer.qkv_bias is not None
    before = scales_of(made.spec, layer)
    bias = layer.qkv_bias.clone()
    bias[made.spec.heads * made.spec.head_dim + 3] = 5000.0  # of the first key head
    after = scales_of(made.spec, replace(layer, qkv_bias=bias))
    assert after[0, 0] >= 5000 / FP8_MAX > before[0, 0]
    assert torch.equal(after.view(-1)[1:], before.view(-1)[1:])


def test_what_is_lost_on_the_way_through_memory() -> None:
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([0.25, 8.0])
    exponents = torch.rand((64, 2, 96), generator=generator) * 14 - 6  # 2^-6 to 2^8
    signs = torch.randn(exponents.shape, generator=generator).sign()
    numbers = signs * torch.exp2(exponents) * scales[:, None]
    back = from_fp8(to_fp8(numbers, scales).transpose(0, 1)[None], scales, torch.float32)
    error = (back[0].transpose(0, 1) - numbers).abs() / numbers.abs()
    assert error.max() <= 2.0**-4
    assert 0.015 < error.pow(2).mean().sqrt() < 0.03
    kept = from_fp8(
        to_fp8(numbers.bfloat16(), scales).transpose(0, 1)[None], scales, torch.bfloat16
    )
    assert (kept.float() - back).abs().max() <= numbers.abs().max() * 2.0**-3


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 449.0, -1e30])
def test_what_is_no_number_stays_none(broken: float) -> None:
    scales = torch.ones(1)
    back = from_fp8(to_fp8(torch.tensor([[[broken, 448.0]]]), scales), scales, torch.float32)
    assert back[0, 0, 0].isnan()
    assert back[0, 0, 1] == 448.0


@pytest.mark.parametrize("shape", ["llama", "mistral-one-head", "llama-no-groups"])
def test_each_layers_scales_begin_where_kernels_expect(shape: str, checkpoint: Make) -> None:
    spec = checkpoint(shape).spec
    scales = no_scales(spec, torch.device("cpu"))
    assert scales.shape == (spec.layers, 2, spec.kv_heads)
    assert (scales == 1).all()
    for layer in scales:
        assert layer.is_contiguous()
        assert (layer.data_ptr() - scales.data_ptr()) % 16 == 0
