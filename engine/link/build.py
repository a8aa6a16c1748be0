"""Messages between hotbayd and an image builder (a socket pair, inherited as a descriptor).

A builder lives for one checkpoint: hotbayd asks `Inspect`, decides whether the image fits, hands
over a segment of the size that was answered, and waits for `Built`; or, when an image of the same
checkpoint is on disk, for `Restored`. Another one, later, is handed the sealed segment with `Save`
and writes it to disk; one more, with `Touch`, makes memory present before
anybody needs it. A builder never sees a device and never allocates the image's memory itself.
"""

from __future__ import annotations

import msgspec

PACKED_DTYPE = "bfloat16-packed"
"""bfloat16 in a packed image; see `swap.packing`."""


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Read a checkpoint's configuration and headers. Answered by Inspected or Failed."""

    directory: str
    dtype: str = "float32"
    """What the weights are cast to: float32, bfloat16, float16, or PACKED_DTYPE."""
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
    """Host memory the image takes, its manifest included; a packed one at most, while it is built.
    """
    weights_bytes: int
    """Device memory its weights take, before rounding up to pages; those of a packed image at most.
    """
    kv_bytes_per_token: int
    key: str = ""
    """Identifies the checkpoint's files as they are now, together with the image they become."""
    kv_fp8_bytes_per_token: int = 0
    """The same where keys and values are stored as FP8."""
    kv_window_tokens: int = 0
    """How far back any of its layers looks: the KV of tokens before need not be kept. 0 is to the
    beginning."""


class Build(msgspec.Struct, frozen=True, tag=True):
    """Build the inspected image into the segment whose descriptor travels along.

    Answered by Built or Failed; BuildProgress comes meanwhile.
    """

    threads: int = 2
    numa_node: int = -1
    """Where its memory should be; -1 leaves that to the system."""
    call: int = 0


class Restore(msgspec.Struct, frozen=True, tag=True):
    """Read the inspected checkpoint's image from a file into the segment that travels along.

    Answered by Restored or Failed; BuildProgress comes meanwhile. After Failed the segment's
    contents mean nothing, and the inspection still holds.
    """

    path: str
    digest: str
    threads: int = 4
    numa_node: int = -1
    """Where its memory should be; -1 leaves that to the system."""
    call: int = 0


class Restored(msgspec.Struct, frozen=True, tag=True):
    """The image is complete, checked and sealed."""

    call: int


class Save(msgspec.Struct, frozen=True, tag=True):
    """Write the image in the sealed segment that travels along to a file. Needs no inspection.

    Answered by Saved or Failed.
    """

    path: str
    call: int = 0


class Touch(msgspec.Struct, frozen=True, tag=True):
    """Make all memory of the unsealed segment that travels along present. Needs no inspection.

    Answered by Touched or Failed; its owner may cut the segment meanwhile, which is a failure.
    """

    threads: int = 4
    huge_pages: bool = True
    """Whether to ask for transparent ones."""
    numa_node: int = -1
    """Where the memory should be; -1 leaves that to the system."""
    call: int = 0


class Touched(msgspec.Struct, frozen=True, tag=True):
    """All of the segment's memory is present."""

    call: int


class Saved(msgspec.Struct, frozen=True, tag=True):
    """The file is complete, on disk and under its name."""

    call: int


class BuildProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the image written so far."""

    bytes_done: int
    bytes_total: int


class Built(msgspec.Struct, frozen=True, tag=True):
    """The image is complete and sealed."""

    call: int
    digest: str
    key: str = ""
    """As in Inspected; empty when the files changed meanwhile, or so shortly before that a change
    might not show. The image is then not to be found again by its files."""


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Turn a text into a checkpoint's tokens, special ones included. Answered by Tokenized."""

    directory: str
    text: str
    call: int = 0


class Tokenized(msgspec.Struct, frozen=True, tag=True):
    """The tokens of a text."""

    call: int
    tokens: tuple[int, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint cannot be inspected or built; says which file or tensor, and why."""

    call: int
    reason: str
    message: str
    metadata: dict[str, str] = {}


ToBuilder = Inspect | Build | Restore | Save | Touch | Tokenize
FromBuilder = Inspected | BuildProgress | Built | Restored | Saved | Touched | Tokenized | Failed
