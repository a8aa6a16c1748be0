"""Residual addition and root-mean-square norm, in one launch.

Owns that kernel and its launch. Equals `engine.kernels.reference.dense.rms_norm` of the sum, with
the same roundings: the sum is rounded to its dtype before it is squared, since that is what the
residual will hold, and the scaled row is rounded before it is weighted. A row is one program's and
is reduced in one fixed order, so its result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant

ROW_ELEMENTS_MAX = 1 << 15
"""Widest row that one program holds in registers."""
WARPS_MAX = 16
_ELEMENTS_PER_WARP = 512


@triton.jit
def add_rms_norm_kernel(
    rows,
    residual,
    weight,
    normed,
    rows_stride,
    residual_stride,
    normed_stride,
    width,
    epsilon,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual += rows; normed = residual / rms(residual) * weight.

    Shapes: `rows`, `residual`, `normed` [n, width], `weight` [width]; without ADDED the norm is of
    `rows` and `residual` is not touched. Grid: (n,). Bytes moved: 4 n width elements when added,
    2 n width when not.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(rows + row * rows_stride + column, mask=inside, other=0.0)
    if ADDED:
        place = residual + row * residual_stride + column
        value = (value.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(place, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + epsilon)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    scaled = (wide * scale).to(value.dtype).to(tl.float32)
    result = (scaled * factor.to(tl.float32)).to(value.dtype)
    tl.store(normed + row * normed_stride + column, result, mask=inside)


def add_rms_norm(
    rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Add `rows` [n, width] to `residual` in place and norm the sum; None norms `rows` alone.

    Rows may be strided, their elements lie side by side. Returns [n, width], contiguous.
    """
    count, width = rows.shape
    assert width <= ROW_ELEMENTS_MAX, f"a row of {width} elements is wider than {ROW_ELEMENTS_MAX}"
    assert rows.stride(1) == 1
    assert residual is None or residual.stride(1) == 1
    normed = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    if count:
        block = triton.next_power_of_2(width)
        other = rows if residual is None else residual
        add_rms_norm_kernel[(count,)](
            rows,
            other,
            weight,
            normed,
            rows.stride(0),
            other.stride(0),
            normed.stride(0),
            width,
            epsilon,
            ADDED=residual is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return normed


def _warps(block: int) -> int:
    return min(max(block // _ELEMENTS_PER_WARP, 1), WARPS_MAX)


def variants() -> Iterator[Variant]:
    pointers = dict.fromkeys(("rows", "residual", "weight", "normed"), "*bf16:16")
    strides = dict.fromkeys(("rows_stride", "residual_stride", "normed_stride"), "i32:16")
    signature = {**pointers, **strides, "width": "i32:16", "epsilon": "fp32"}
    for width in (2048, 4096, 8192):
        yield Variant(
            f"bf16 width {width}",
            add_rms_norm_kernel,
            signature,
            {"ADDED": True, "BLOCK": width},
            num_warps=_warps(width),
        )
