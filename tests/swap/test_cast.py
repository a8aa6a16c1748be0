"""Casting, against torch bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swap.cast import cast
from swap.errors import CheckpointInvalid

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _every_half() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)


def _singles() -> np.ndarray:
    """Random bit patterns, and the neighbourhood of every value where rounding is decided."""
    numbers = np.random.default_rng(3)
    random = numbers.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    upper = numbers.integers(0, 1 << 16, 20_000, dtype=np.uint32) << np.uint32(16)
    ties = [upper + np.uint32(low) for low in (0x7FFF, 0x8000, 0x8001, 0, 0xFFFF)]
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        near = [halves.view(np.uint32) + np.uint32(add) for add in (0x0FFF, 0x1000, 0x1001)]
    return np.concatenate([random, *ties, *near]).view(np.uint8)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("checkpoint_dtype", list(NAMES))
def test_casting_equals_torch(checkpoint_dtype, dtype):
    raw = _singles() if checkpoint_dtype == "F32" else _every_half()
    source = torch.from_numpy(raw.copy()).view(TORCH[NAMES[checkpoint_dtype]])
    expected = source.to(TORCH[dtype])
    found = torch.from_numpy(cast(raw, checkpoint_dtype, dtype).copy()).view(TORCH[dtype])
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    integers = torch.int32 if dtype == "float32" else torch.int16
    assert torch.equal(found[kept].view(integers), expected[kept].view(integers))


def test_what_needs_no_cast_is_not_copied():
    raw = np.arange(8, dtype=np.uint8)
    assert cast(raw, "F16", "float16") is raw


@pytest.mark.parametrize("checkpoint_dtype", ["I64", "F64", "F8_E4M3", "BOOL"])
def test_other_dtypes_are_refused_by_name(checkpoint_dtype):
    with pytest.raises(CheckpointInvalid, match=checkpoint_dtype):
        cast(np.zeros(8, np.uint8), checkpoint_dtype, "float32")
