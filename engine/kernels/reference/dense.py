"""Matrix products, norms and the gated activation in torch.

Owns nothing and keeps nothing. Everything is computed in the dtype that comes in, but norms, which
are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


SWAPPED_ROWS = range(8, 97)
"""Rows for which oneDNN is faster with the weight as its left operand. It rearranges the right one
on each call: with few rows that is the work. Measured on a Zen 5 with AVX-512, a core, transposing
included: 201 against 169 GFLOP/s at 32 rows of a 1024 x 512 weight, 211 against 147 at 512 x 1408;
even at 128 rows, and below 8 rows memory is what limits both."""


def choose_linear(dtype: torch.dtype, device: torch.device) -> Linear:
    """The fastest product for this device and dtype; on a GPU it is torch's own.

    In float32 torch takes MKL, which on processors of other makers than Intel runs at about half
    the rate of oneDNN (75 against 150 GFLOP/s at 32 rows, measured as above). oneDNN is reached
    through the operator that torch's compiler uses; where a build lacks it, or for another dtype,
    torch chooses.
    """
    if device.type == "cpu" and dtype is torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if operator is not None:
            return _onednn_linear(operator.default)
    return functional.linear


def _onednn_linear(pointwise: Callable[..., torch.Tensor]) -> Linear:
    def linear(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if rows.shape[0] not in SWAPPED_ROWS:
            return pointwise(rows, weight, bias, "none", [], "")
        product = pointwise(weight, rows, None, "none", [], "").t().contiguous()
        return product if bias is None else product.add_(bias)

    return linear


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""
    if rows.dtype is torch.float32:
        return functional.rms_norm(rows, weight.shape, weight, epsilon)
    # The scaled row is rounded before it is weighted, as the families' own code does.
    scaled = functional.rms_norm(rows.float(), weight.shape, None, epsilon)
    return weight * scaled.to(rows.dtype)


def gated_activation(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2 width] to [n, width]: SiLU(first half) * second half."""
    width = gate_up.shape[-1] // 2
    return functional.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
