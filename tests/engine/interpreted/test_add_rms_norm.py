"""Residual and norm in one launch, held to torch's in two."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.reference import dense
from engine.kernels.triton.add_rms_norm import add_rms_norm
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch

EPSILON = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(count: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows, residual and weight; rows lie apart, with what must not be read between them."""
    generator = torch.Generator().manual_seed(width)
    apart = torch.full((2, count, width + 3), float("nan"), dtype=dtype)
    apart[..., :width] = (torch.randn(2, count, width, generator=generator) * 3).to(dtype)
    weight = (1 + torch.randn(width, generator=generator) / 4).to(dtype)
    return apart[0, :, :width], apart[1, :, :width], weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(0, 8), (1, 1), (3, 63), (2, 64), (5, 65), (2, 1000)])
def test_sum_and_norm_equal_torch(count: int, width: int, dtype: torch.dtype) -> None:
    rows, residual, weight = inputs(count, width, dtype)
    summed = residual + rows
    expected = dense.rms_norm(summed, weight, EPSILON)
    wide = summed.double()
    scale = (wide.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
    before = rows.clone()
    found = add_rms_norm(rows, residual, weight, EPSILON)
    assert torch.equal(residual, summed)
    assert torch.equal(rows, before)
    assert_as_exact_as_torch(found, expected, wide * scale * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_alone_leaves_its_rows(dtype: torch.dtype) -> None:
    rows, _, weight = inputs(3, 48, dtype)
    before = rows.clone()
    found = add_rms_norm(rows, None, weight, EPSILON)
    assert torch.equal(rows, before)
    wide = rows.double()
    exact = wide * (wide.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt() * weight.double()
    assert_as_exact_as_torch(found, dense.rms_norm(rows.contiguous(), weight, EPSILON), exact)


def test_a_row_is_the_same_in_any_batch() -> None:
    rows, residual, weight = inputs(7, 96, torch.bfloat16)
    alone = residual.clone()
    together = add_rms_norm(rows, residual, weight, EPSILON)
    single = [add_rms_norm(rows[i : i + 1], alone[i : i + 1], weight, EPSILON) for i in range(7)]
    assert torch.equal(torch.cat(single), together)


def test_rows_of_zeros_stay_finite() -> None:
    rows = torch.zeros(2, 16)
    assert torch.equal(add_rms_norm(rows, rows.clone(), torch.ones(16), EPSILON), rows)
