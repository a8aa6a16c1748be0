"""What a checkpoint is at this moment, so that an image made of it earlier can stand in for it.

It owns the rule by which two moments count as the same checkpoint: the files that are open now have
the same inodes, sizes, times of modification and of change and the same headers, and would become
the same image, from the same recipes. It never reads weights. The time of change (ctime) is what
makes the rule safe: tools that keep or set times of modification cannot set that one. Invariant: a
checkpoint whose files changed after its identity was taken never gets that identity again, unless
it was unsettled: changed so shortly before that the file system's clock may not tell two apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from swap.checkpoint import Checkpoint
from swap.image import Manifest, TensorRecipe

SETTLE_S = 2.0
"""Older than the coarsest clock of a file system (FAT's, 2 s) can hide."""
IDENTITY_FORMAT = 1
KEY_CHARACTERS = 64


@dataclass(frozen=True)
class Identity:
    """`key` names a checkpoint as it was; of an unsettled one nothing may be kept under it."""

    key: str
    changed_ns: int
    """The latest change of any of its files, nanoseconds since the epoch."""

    def settled(self, now_ns: int) -> bool:
        """Whether every later change is sure to show. A change in the future is not settled."""
        return now_ns - self.changed_ns >= SETTLE_S * 1e9


def identify(checkpoint: Checkpoint, recipes: Iterable[TensorRecipe], layout: Manifest) -> Identity:
    """The identity of an open checkpoint that is to become the image of `layout`.

    The configuration counts by what it does to the image: `layout` holds the engine's description
    of the model, its dtype, and every tensor's place. Raises CheckpointInvalid when a file's state
    cannot be read.
    """
    digest = hashlib.sha256(f"{IDENTITY_FORMAT}\n".encode())
    changed_ns = 0
    for name, status in checkpoint.statuses():
        state = (name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(msgspec.json.encode(state))
        changed_ns = max(changed_ns, status.st_mtime_ns, status.st_ctime_ns)
    for tensor in checkpoint.tensors.values():
        entry = (tensor.name, tensor.file, tensor.offset_bytes, tensor.dtype, tensor.shape)
        digest.update(msgspec.json.encode(entry))
    digest.update(msgspec.json.encode(tuple(recipes)))
    digest.update(msgspec.json.encode(layout, order="sorted"))
    return Identity(digest.hexdigest(), changed_ns)
