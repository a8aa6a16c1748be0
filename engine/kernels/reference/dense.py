"""Matrix products, norms and the gated activation in torch.

Owns nothing and keeps nothing. Everything is computed in the dtype that comes in, but norms, which
are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""As `Kernels.linear`; what it returns may lie column by column."""

SWAPPED_ROWS = {torch.float32: range(8, 97), torch.bfloat16: range(1, 97)}
"""Rows for which oneDNN is faster with the weight as its left operand, by dtype. It rearranges the
right one on each call: with few rows that is the work. Measured over the products of a 28M model,
whose weights come from memory, on one core of a Sapphire Rapids: 18.1 against 24.0 ms at 32 rows of
float32, 11 against 18 ms at 32 and 3.8 against 5.2 ms at 1 of bfloat16. At 128 rows both ways are
even, and below 8 of float32 memory is what limits both."""


def choose_linear(dtype: torch.dtype, device: torch.device) -> Linear:
    """The fastest product for this device and dtype; on a GPU it is torch's own.

    In float32 torch takes MKL, which takes 1.3 times as long over weights that come from memory
    (measured as above), and on processors of other makers than Intel runs at half of oneDNN's rate.
    oneDNN is reached through the operator that torch's compiler uses; where a build lacks it, or
    for a dtype that it cannot compute on this processor, torch chooses.
    """
    if device.type != "cpu":
        return functional.linear
    pointwise = _onednn_operator(dtype)
    if pointwise is None:
        return functional.linear
    return _swapping(pointwise, SWAPPED_ROWS[dtype])


def _onednn_operator(dtype: torch.dtype) -> Linear | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    operators = torch.ops.mkldnn
    operator = getattr(operators, "_linear_pointwise", None)
    if operator is None or dtype not in SWAPPED_ROWS:
        return None
    if dtype is torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
        return None
    pointwise: Callable[..., torch.Tensor] = operator.default
    return lambda rows, weight, bias: pointwise(rows, weight, bias, "none", [], "")


def _swapping(product: Linear, swapped_rows: range) -> Linear:
    """`product`, with operands exchanged where that is faster: the result is transposed then."""

    def linear(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A bias must be added before the sum is rounded, if it is: a swapped product cannot.
        rounded = bias is not None and rows.dtype is not torch.float32
        if rounded or rows.shape[0] not in swapped_rows:
            return product(rows, weight, bias)
        columns = product(weight, rows, None)
        return (columns if bias is None else columns.add_(bias[:, None])).t()

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
