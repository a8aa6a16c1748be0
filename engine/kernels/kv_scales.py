"""The scales that keys and values are divided by where they are stored as FP8.

Owns how a layer's scales follow from its weights, and what becomes of a number on its way into and
out of memory; it keeps nothing. A scale is of one layer, one key head, and keys or values, and it
never changes: no data is looked at, nothing is calibrated, and the same weights bring the same
bits wherever and whenever they are computed.

What goes into the projections is a normalised row, whose root mean square is one, times the norm's
weights. So no key or value can be larger than the length of its row of weights, times the square
root of the width, plus its bias; and a normalised key head no larger than its norm's weights allow.
Turning adds two such numbers at right angles. The scale is the power of two that brings this bound
below 448, FP8's largest number: so nothing is ever cut off, and scaling itself rounds nothing.
Numbers of ordinary size lie below the bound by about the square root of the width, 64 times for a
width of 4096; FP8 has its full precision over 28000 times, so they keep it. What is larger than the
bound can only come from something that is no number, and is stored as such.
"""

from __future__ import annotations

import math

import torch

from engine.models.spec import ModelSpec

FP8_MAX = 448.0
SLACK = 1.05
"""What rounding in what is computed in may add to a bound."""


def kv_scales(
    spec: ModelSpec,
    attention_norm: torch.Tensor,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    key_norm: torch.Tensor | None,
) -> torch.Tensor:
    """Scales of one layer, [K and V, kv_heads] in float32, where its weights are."""
    first = spec.heads * spec.head_dim
    rows = qkv[first:].float() * attention_norm.float()
    bound = rows.norm(dim=1) * math.sqrt(spec.hidden)
    if qkv_bias is not None:
        bound = bound + qkv_bias[first:].float().abs()
    keys, values = bound.view(2, spec.kv_heads, spec.head_dim)
    if key_norm is not None:
        keys = (key_norm.float().abs() * math.sqrt(spec.head_dim)).expand_as(keys)
    half = spec.head_dim // 2
    turned = torch.hypot(keys[:, :half], keys[:, half:])
    largest = torch.stack((turned.amax(dim=1), values.amax(dim=1))) * (SLACK / FP8_MAX)
    # A head without weights stores zeros, by any scale.
    _, exponent = torch.frexp(largest.clamp(min=2.0**-100))
    return torch.ldexp(torch.ones_like(largest), exponent)


def no_scales(spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """Room for all layers' scales, [layers, K and V, kv_heads], that scale nothing so far."""
    stored = 2 * spec.kv_heads
    # Each layer's begin at a multiple of 16 bytes, as compiled kernels expect.
    room = torch.ones((spec.layers, -(-stored // 4) * 4), device=device)
    return room.as_strided((spec.layers, 2, spec.kv_heads), (room.stride(0), spec.kv_heads, 1))


def to_fp8(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`numbers` [..., kv_heads, head_dim] over `scales` [..., kv_heads], as bytes of FP8."""
    scaled = numbers.float() / scales[..., None]
    fitting = torch.where(scaled.abs() <= FP8_MAX, scaled, float("nan"))
    return fitting.to(torch.float8_e4m3fn).view(torch.uint8)


def from_fp8(stored: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that bytes [..., kv_heads, slots, head_dim] stand for."""
    return stored.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)[..., None, None]
