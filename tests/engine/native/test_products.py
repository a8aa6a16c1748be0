"""Products by the library, and by torch where it is faster, held to exact ones."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as functional

from engine.kernels.native.products import LIBRARYS_ROWS, Products
from tests.engine.native.exactness import DTYPES, assert_exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outs"), [(32, 16), (64, 48), (512, 112), (96, 200), (37, 13)])
def test_products_of_any_shape(
    loaded: ctypes.CDLL, dtype: torch.dtype, width: int, outs: int
) -> None:
    """By each number of rows that is computed another way; none at all among them."""
    linear = Products(loaded, dtype, strict=False).linear
    weight, bias = torch.randn(outs, width).to(dtype), torch.randn(outs).to(dtype)
    bounds = LIBRARYS_ROWS[dtype]
    for count in (0, 1, 7, 8, 15, 16, 17, 32, 33, 63, bounds[-1], bounds.stop):
        rows = torch.randn(count, width).to(dtype)
        exact = rows.double() @ weight.double().T
        for added in (None, bias):
            wanted = exact if added is None else exact + bias.double()
            torchs = functional.linear(rows, weight, added)
            assert_exact(linear(rows, weight, added), torchs, wanted)
        columns = rows.t().contiguous().t()
        assert torch.equal(linear(columns, weight), linear(rows, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outs"), [(64, 48), (352, 208), (40, 24)])
def test_strict_products_are_the_same_bits_for_any_number_of_rows(
    loaded: ctypes.CDLL, dtype: torch.dtype, width: int, outs: int
) -> None:
    linear = Products(loaded, dtype, strict=True).linear
    rows, weight = torch.randn(400, width).to(dtype), torch.randn(outs, width).to(dtype)
    whole = linear(rows, weight)
    for first, count in ((0, 0), (0, 1), (3, 2), (5, 16), (9, 17), (1, 60), (30, 301)):
        part = linear(rows[first : first + count], weight)
        assert torch.equal(part, whole[first : first + count])
