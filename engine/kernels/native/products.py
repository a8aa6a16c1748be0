"""Products by weights: the library's where it is faster, torch's elsewhere.

Owns that choice. Invariant: of a strict one all results come the same way, whatever the number of
rows, and the library's are the same bit for bit beside any other rows.
"""

from __future__ import annotations

import ctypes

import torch

from engine.kernels.native.machine_code import has_matrix_unit
from engine.kernels.reference import dense
from engine.kernels.strict import STRICT_ROWS, of_fixed_rows

LIBRARYS_ROWS = {torch.float32: range(8, 65), torch.bfloat16: range(1, 257)}
"""Numbers of rows for which a product is the library's, by dtype. With more, a weight's bytes are
not what it waits for, and oneDNN's is as fast; with fewer in float32 they are all it waits for, and
MKL reads them faster. Measured over the products of a 28M model, whose weights come from memory, on
one core of a Sapphire Rapids, the library's against the faster of the two, in ms: in float32 10.1
and 6.9 for 1 row, 10.1 and 13.3 for 8, 14.7 and 18.4 for 32, 54 and 51 for 128; in bfloat16 2.8 and
4.3 for 1, 4.2 and 6.0 for 32, 10.5 and 14.7 for 128, 35.9 and 31.0 for 512."""
PACKED_ROWS = 16
"""Rows are packed in so many; those that lack are zeros."""
TILE_WIDTH, TILE_ROWS = 32, 16
"""What a weight's two dimensions are multiples of on the matrix unit."""


class Products:
    """Products of one dtype, float32 or bfloat16, on this processor."""

    def __init__(self, loaded: ctypes.CDLL, dtype: torch.dtype, *, strict: bool) -> None:
        self._dtype = dtype
        self._half = dtype is torch.bfloat16
        self._rows = LIBRARYS_ROWS[dtype]
        self._strict = strict
        self._product = loaded.hotbay_linear_half if self._half else loaded.hotbay_linear_float
        self._usable = bool(
            has_matrix_unit(loaded) if self._half else loaded.hotbay_has_wide_vectors()
        )
        self._others = dense.choose_linear(dtype, torch.device("cpu"))
        if strict:
            self._others = of_fixed_rows(self._others, STRICT_ROWS["cpu"])

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Kernels.linear`."""
        count, (outs, width) = len(rows), weight.shape
        fits = not self._half or (width % TILE_WIDTH == 0 and outs % TILE_ROWS == 0)
        if not (self._usable and fits and (self._strict or count in self._rows)):
            return self._others(rows, weight, bias)
        assert weight.is_contiguous(), "a weight's rows lie one after the other"
        assert rows.dtype is weight.dtype is self._dtype
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = rows.new_empty(count, outs)
        packed = rows.new_empty(-(-count // PACKED_ROWS) * PACKED_ROWS * width)
        self._product(
            rows.data_ptr(),
            rows.stride(0),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            packed.data_ptr(),
            count,
            width,
            outs,
        )
        return out
