"""Casting weights between the float formats of checkpoints and of images, bit by bit in numpy.

It owns three formats (float32, float16, bfloat16) and rounds to nearest, ties to even, as every
framework does; it never touches files. numpy has no bfloat16, which is the upper half of a float32,
so its values are handled as 16-bit integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from swap.errors import CheckpointInvalid

Raw = NDArray[np.uint8]

FORMATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Checkpoint dtypes that can be read into an image, under the image's name for them."""


def cast(raw: Raw, checkpoint_dtype: str, dtype: str) -> Raw:
    """Elements of `checkpoint_dtype` (bytes, whole elements) as bytes of elements of `dtype`.

    Values beyond float16 become infinite. May return `raw` itself.
    """
    source = FORMATS.get(checkpoint_dtype)
    if source is None:
        raise CheckpointInvalid(
            f"weights of dtype {checkpoint_dtype} cannot be cast to {dtype}: "
            f"use a checkpoint of {', '.join(FORMATS)}",
            dtype=checkpoint_dtype,
        )
    if source == dtype:
        return raw
    single = _to_single(raw, source)
    if dtype == "float32":
        result: NDArray[Any] = single
    elif dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            result = single.astype(np.float16)
    else:
        result = _single_to_brain(single)
    return result.view(np.uint8)


def _to_single(raw: Raw, source: str) -> NDArray[np.float32]:
    if source == "float32":
        return raw.view(np.float32)
    if source == "float16":
        return raw.view(np.float16).astype(np.float32)
    wide = raw.view(np.uint16).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _single_to_brain(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = single.view(np.uint32)
    # Adding half a unit, less one bit if the result would be even, carries exactly when rounding
    # to nearest even goes up.
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    not_numbers = np.isnan(single)
    if not_numbers.any():
        result[not_numbers] = np.uint16(0x7FC0)
    return result
