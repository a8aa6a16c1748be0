"""Messages between hotbayd and an image builder (a socket pair, inherited as a descriptor).

A builder lives for one checkpoint: hotbayd asks `Inspect`, decides whether the image fits, hands
over a segment of the size that was answered, and waits for `Built`. A builder never sees a device
and never allocates the image's memory itself.
"""

from __future__ import annotations

import msgspec


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Read a checkpoint's configuration and headers. Answered by Inspected or Failed."""

    directory: str
    dtype: str = "float32"
    """What the weights are cast to: float32, bfloat16 or float16."""
    call: int = 0


class Inspected(msgspec.Struct, frozen=True, tag=True):
    """What a checkpoint is and what serving it takes."""

    call: int
    family: str
    parameters: int
    vocabulary: int
    layers: int
    context_tokens: int
    checkpoint_bytes: int
    segment_bytes: int
    """Host memory the image takes, its manifest included."""
    weights_bytes: int
    """Device memory its weights take, before rounding up to pages."""
    kv_bytes_per_token: int


class Build(msgspec.Struct, frozen=True, tag=True):
    """Build the inspected image into the segment whose descriptor travels along.

    Answered by Built or Failed; BuildProgress comes meanwhile.
    """

    call: int = 0


class BuildProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the image written so far."""

    bytes_done: int
    bytes_total: int


class Built(msgspec.Struct, frozen=True, tag=True):
    """The image is complete and sealed."""

    call: int
    digest: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint cannot be inspected or built; says which file or tensor, and why."""

    call: int
    reason: str
    message: str
    metadata: dict[str, str] = {}


ToBuilder = Inspect | Build
FromBuilder = Inspected | BuildProgress | Built | Failed
