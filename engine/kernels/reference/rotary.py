"""The rotary position embedding in torch: halves of each head turned against each other.

Owns the frequencies and their stretching. Invariant: a position's angles depend on the position
alone and are computed in float32, whatever the dtype of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.models.spec import Llama3Scaling, Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines [tokens, 1, head_dim] and sines [tokens, 1, head_dim / 2] of a step's positions."""

    cosine: torch.Tensor
    sine: torch.Tensor


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    base = 1.0 / (rope.theta**exponents)
    return base if rope.scaling is None else _stretched(base, rope.scaling)


def angles(positions: torch.Tensor, frequency: torch.Tensor, dtype: torch.dtype) -> Angles:
    """Angles of `positions` [tokens]."""
    turned = positions.to(torch.float32)[:, None, None] * frequency
    cosine = turned.cos()
    return Angles(torch.cat((cosine, cosine), dim=-1).to(dtype), turned.sin().to(dtype))


def rotate(heads: torch.Tensor, turned: Angles) -> torch.Tensor:
    """Turn [tokens, heads, head_dim] by its positions' angles; the result is contiguous.

    Dimension i is paired with i + head_dim / 2: (a, b) to (a cos - b sin, b cos + a sin).
    """
    half = heads.shape[-1] // 2
    rotated = heads * turned.cosine
    rotated[..., :half].addcmul_(heads[..., half:], turned.sine, value=-1.0)
    rotated[..., half:].addcmul_(heads[..., :half], turned.sine)
    return rotated


def _stretched(base: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are stretched by the factor, short ones stay.

    Waves between `original / high` and `original / low` positions are blended smoothly.
    """
    original = scaling.original_context_tokens
    low_wave = original / scaling.low_freq_factor
    high_wave = original / scaling.high_freq_factor
    wave = 2 * math.pi / base
    stretched = torch.where(wave > low_wave, base / scaling.factor, base)
    blend = (original / wave - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - blend) * stretched / scaling.factor + blend * stretched
    between = (wave >= high_wave) & (wave <= low_wave)
    return torch.where(between, smoothed, stretched)
