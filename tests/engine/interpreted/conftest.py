"""The tests of this folder run kernels in Triton's interpreter, which must be asked for before
triton is imported: `TRITON_INTERPRET=1 pytest tests/engine/interpreted`. In an ordinary run,
`test_interpreted_kernels.py` runs all of them in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


FP8_VALUES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
"""By code: those below 127 are positive and ascending, and 127 is no number."""


def fp8_codes(values: Any) -> Any:
    """The nearest FP8 of float32, ties to even; without torch, whose calls graphs write down."""
    between = (FP8_VALUES[:126] + FP8_VALUES[1:127]) / 2
    size = np.abs(values)
    codes = np.searchsorted(between, size)
    ties = np.append(between, np.inf)[codes] == size
    codes += ties & (codes % 2 == 1)
    codes = np.where(np.isnan(values), 127, codes)
    return (codes | (np.signbit(values) << 7)).astype(np.uint8)


@pytest.fixture(scope="session", autouse=True)
def rounding_to_nearest() -> Iterator[None]:
    """Let float32 become bfloat16 as it does on a GPU: to the nearest, ties to even.

    The interpreter cuts digits off, which is an error of twice the size that no GPU makes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return before(self, source, kind)
        values = np.ascontiguousarray(source.data)
        bits = values.view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        kept = np.where(np.isnan(values), np.uint16(0x7FC0), nearest)
        return interpreter.TensorHandle(kept.reshape(source.data.shape), kind.scalar)

    before_fp8 = interpreter.InterpreterBuilder.create_fp_to_fp

    def convert(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        """To and from FP8 as a GPU does; the interpreter neither carries nor knows NaN."""
        if kind.scalar == tl.float8e4nv:
            values = source.data
            assert source.dtype.scalar == tl.float32
            return interpreter.TensorHandle(fp8_codes(values), kind.scalar)
        if source.dtype.scalar == tl.float8e4nv:
            wide = interpreter.TensorHandle(FP8_VALUES[source.data], tl.float32)
            return wide if kind.scalar == tl.float32 else self.cast_impl(wide, kind)
        return before_fp8(self, source, kind, rounding)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    patch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", convert)
    yield
    patch.undo()
