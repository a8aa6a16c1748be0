"""SiLU of one half of a row times the other half, in one launch.

Owns that kernel and its launch. Equals `engine.kernels.reference.dense.gated_activation`, with the
same rounding between activation and product. The halves are read where the product left them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant

BLOCK_ELEMENTS = 1024


@triton.jit
def gated_activation_kernel(
    gate_up, gated, gate_up_stride, gated_stride, width, BLOCK: tl.constexpr
):
    """gated = silu(gate_up[:, :width]) * gate_up[:, width:].

    Shapes: `gate_up` [n, 2 width], `gated` [n, width]. Grid: (n, width / BLOCK, rounded up).
    Bytes moved: 3 n width elements.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * gate_up_stride + column
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + width, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(gate.dtype)
    tl.store(gated + row * gated_stride + column, result, mask=inside)


def gated_activation(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2 width] to [n, width], contiguous; rows may be strided."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    gated = torch.empty((count, width), dtype=gate_up.dtype, device=gate_up.device)
    if count:
        block = min(BLOCK_ELEMENTS, triton.next_power_of_2(width))
        gated_activation_kernel[(count, triton.cdiv(width, block))](
            gate_up,
            gated,
            gate_up.stride(0),
            gated.stride(0),
            width,
            BLOCK=block,
            num_warps=4,
        )
    return gated


def variants() -> Iterator[Variant]:
    signature = {
        "gate_up": "*bf16:16",
        "gated": "*bf16:16",
        "gate_up_stride": "i32:16",
        "gated_stride": "i32:16",
        "width": "i32:16",
    }
    yield Variant("bf16", gated_activation_kernel, signature, {"BLOCK": BLOCK_ELEMENTS})
