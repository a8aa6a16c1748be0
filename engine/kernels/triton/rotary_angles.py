"""Cosines and sines of a step's positions, once a step for all of its layers.

Owns that kernel and its launch. Equals `engine.kernels.reference.rotary.angles` in float32: a
table over the whole context would be tens of megabytes a model, and angles in each layer's kernel
would pay for the reduction of large arguments once a head and layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant


@triton.jit
def rotary_angles_kernel(positions, frequencies, angles, half, angles_stride, BLOCK: tl.constexpr):
    """angles = (cos, sin) of position * frequency.

    Shapes: `positions` [tokens], `frequencies` [half] in float32, `angles` [tokens, 2, half] in
    float32. Grid: (tokens,). Bytes moved: 8 tokens half.
    """
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < half
    position = tl.load(positions + token).to(tl.float32)
    turned = position * tl.load(frequencies + pair, mask=inside, other=0.0)
    place = angles + token * angles_stride + pair
    tl.store(place, tl.cos(turned), mask=inside)
    tl.store(place + half, tl.sin(turned), mask=inside)


def rotary_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Angles [tokens, 2, pairs] of `positions` [tokens], written to `out` where it is given."""
    tokens, half = len(positions), len(frequencies)
    angles = out
    if angles is None:
        angles = torch.empty((tokens, 2, half), dtype=torch.float32, device=positions.device)
    if tokens:
        rotary_angles_kernel[(tokens,)](
            positions,
            frequencies,
            angles,
            half,
            angles.stride(0),
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
    return angles


def variants() -> Iterator[Variant]:
    signature = {
        "positions": "*i64:16",
        "frequencies": "*fp32:16",
        "angles": "*fp32:16",
        "half": "i32:16",
        "angles_stride": "i32:16",
    }
    # Arguments beyond 105,615 take a path of libdevice that needs a stack; it runs once a step.
    yield Variant(
        "64 pairs", rotary_angles_kernel, signature, {"BLOCK": 64}, num_warps=1, hot=False
    )
