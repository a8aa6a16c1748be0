"""The tests of this folder run kernels in Triton's interpreter, which must be asked for before
triton is imported: `TRITON_INTERPRET=1 pytest tests/engine/interpreted`. In an ordinary run,
`test_interpreted_kernels.py` runs all of them in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


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

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    yield
    patch.undo()
