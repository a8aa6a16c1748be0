"""What an image is: fused tensors in the order they are needed, and the manifest that says so.

It owns the layout and the bytes of the manifest; it never reads a checkpoint and never maps memory.
A segment holds the weights, then the manifest as JSON, then a trailer of fixed size at its very
end, so that a bare descriptor describes itself. Tensors start at multiples of 256 bytes and each
layer's span at a multiple of 4096. Invariant: a manifest that was read is consistent (no tensor
lies outside its layer, no layer outside the weights), so a reader may copy by it without looking.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import msgspec

from swap.errors import CorruptWeights

FORMAT = 1
TENSOR_ALIGNMENT_BYTES = 256
LAYER_ALIGNMENT_BYTES = 4096
MANIFEST_BYTES_MAX = 64 << 20
EMBEDDING_LAYER = -1

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes weights can have in an image, and the bytes of one element."""

_TRAILER = struct.Struct("<8sQQI4x")  # magic, manifest offset, manifest bytes, CRC-32 of it
_MAGIC = b"HOTBAYIM"
_NO_CHECKSUM = "0" * 32
_NO_DIGEST = "0" * 64
_READ_BYTES = 8 << 20


class TensorRecipe(msgspec.Struct, frozen=True):
    """One tensor of the engine, made of checkpoint tensors stacked along their first dimension."""

    name: str
    layer: int
    """-1 is the embedding, 0 to n-1 the layers, n what comes after them."""
    sources: tuple[str, ...]
    shape: tuple[int, ...]


class TensorEntry(msgspec.Struct, frozen=True):
    """Where a tensor lies in the image. `checksum` is half of the SHA-256 of its bytes, in hex."""

    name: str
    layer: int
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: str
    checksum: str = _NO_CHECKSUM

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class LayerSpan(msgspec.Struct, frozen=True):
    """The bytes of one layer, padding included; copying it brings all of the layer's tensors."""

    layer: int
    offset_bytes: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """All about an image. `digest` names its contents: same digest, same weights and model."""

    format: int
    digest: str
    dtype: str
    weights_bytes: int
    tensors: tuple[TensorEntry, ...]
    layers: tuple[LayerSpan, ...]
    """In the order they are needed, without gaps from byte 0 to `weights_bytes`."""
    model: dict[str, Any]
    """The engine's description of the model; opaque here."""


def plan_image(
    recipes: Iterable[TensorRecipe], dtype: str, model: dict[str, Any] | None = None
) -> Manifest:
    """Lay tensors out by layer, then in the order given. Checksums and digest are not set yet.

    `model` must be plain JSON data. Raises ValueError for a dtype no image has, a name given
    twice or no recipes at all: mistakes of the engine, not of a checkpoint.
    """
    ordered = sorted(recipes, key=lambda recipe: recipe.layer)
    if dtype not in ITEM_BYTES or not ordered:
        raise ValueError(f"an image of {len(ordered)} tensors as {dtype!r} cannot be laid out")
    if len({recipe.name for recipe in ordered}) != len(ordered):
        raise ValueError("two recipes have the same name")
    tensors: list[TensorEntry] = []
    layers: list[LayerSpan] = []
    offset = start = 0
    for index, recipe in enumerate(ordered):
        offset = _round_up(offset, TENSOR_ALIGNMENT_BYTES)
        entry = TensorEntry(recipe.name, recipe.layer, offset, recipe.shape, dtype)
        tensors.append(entry)
        offset += entry.size_bytes
        if index + 1 == len(ordered) or ordered[index + 1].layer != recipe.layer:
            offset = _round_up(offset, LAYER_ALIGNMENT_BYTES)
            layers.append(LayerSpan(recipe.layer, start, offset - start))
            start = offset
    # What comes back from the manifest must be what was hashed: JSON data, with keys as text.
    described: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(model or {}))
    return Manifest(FORMAT, _NO_DIGEST, dtype, offset, tuple(tensors), tuple(layers), described)


def complete(layout: Manifest, checksums: dict[str, str]) -> Manifest:
    """The manifest of a built image: the layout with every tensor's checksum, and its digest."""
    tensors = tuple(
        msgspec.structs.replace(entry, checksum=checksums[entry.name]) for entry in layout.tensors
    )
    manifest = msgspec.structs.replace(layout, tensors=tensors, digest=_NO_DIGEST)
    return msgspec.structs.replace(manifest, digest=_digest_of(manifest))


def same_layout(manifest: Manifest, layout: Manifest) -> bool:
    """Whether an image is what `layout` plans: all alike but for checksums and digest."""
    tensors = tuple(
        msgspec.structs.replace(entry, checksum=_NO_CHECKSUM) for entry in manifest.tensors
    )
    return msgspec.structs.replace(manifest, tensors=tensors, digest=_NO_DIGEST) == layout


def segment_bytes(layout: Manifest) -> int:
    """Size of the segment an image takes; known before it is built, since hashes have one size."""
    used = layout.weights_bytes + len(msgspec.json.encode(layout)) + _TRAILER.size
    return _round_up(used, LAYER_ALIGNMENT_BYTES)


def write_manifest(descriptor: int, manifest: Manifest) -> None:
    """Write manifest and trailer behind the weights, into a segment of `segment_bytes`."""
    encoded = msgspec.json.encode(manifest)
    trailer = _TRAILER.pack(_MAGIC, manifest.weights_bytes, len(encoded), zlib.crc32(encoded))
    write_all(descriptor, encoded, manifest.weights_bytes)
    write_all(descriptor, trailer, os.fstat(descriptor).st_size - _TRAILER.size)


def read_manifest(descriptor: int) -> Manifest:
    """The manifest of the image in a segment, checked for consistency; weights are not read.

    Raises CorruptWeights.
    """
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _TRAILER.size, max(size - _TRAILER.size, 0))
    if len(raw) != _TRAILER.size:
        raise CorruptWeights(f"a segment of {size} bytes holds no image", segment_bytes=size)
    magic, offset, length, crc = _TRAILER.unpack(raw)
    if magic != _MAGIC:
        raise CorruptWeights("a segment does not end with an image's trailer: it was not finished")
    if length > MANIFEST_BYTES_MAX or offset + length + _TRAILER.size > size:
        raise CorruptWeights(
            f"an image's trailer puts {length} bytes of manifest at {offset}, which a segment of "
            f"{size} bytes does not hold"
        )
    encoded = os.pread(descriptor, length, offset)
    if len(encoded) != length or zlib.crc32(encoded) != crc:
        raise CorruptWeights("an image's manifest was altered or cut: build the image again")
    try:
        manifest = msgspec.json.decode(encoded, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CorruptWeights(f"an image's manifest is not understood: {error}") from error
    problem = _inconsistency(manifest, offset)
    if problem:
        raise CorruptWeights(f"an image's manifest is inconsistent: {problem}")
    return manifest


def verify_image(descriptor: int, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare tensors (all, or those named) with their checksums, reading from the segment.

    Runs at about 2 GB/s a core where the processor has SHA instructions. Raises CorruptWeights.
    """
    wanted = None if names is None else frozenset(names)
    buffer = bytearray(_READ_BYTES)
    for entry in manifest.tensors:
        if wanted is not None and entry.name not in wanted:
            continue
        hasher = hashlib.sha256()
        end = entry.offset_bytes + entry.size_bytes
        position = entry.offset_bytes
        while position < end:
            view = memoryview(buffer)[: min(_READ_BYTES, end - position)]
            count = os.preadv(descriptor, [view], position)
            if count == 0:
                raise CorruptWeights(f"the segment ends within tensor {entry.name}")
            hasher.update(view[:count])
            position += count
        if checksum_of(hasher) != entry.checksum:
            raise CorruptWeights(
                f"tensor {entry.name} of image {manifest.digest[:12]} is not what was built: "
                "build the image again",
                tensor=entry.name,
                digest=manifest.digest,
            )


def checksum_of(hasher: hashlib._Hash) -> str:
    """A tensor's checksum from the SHA-256 over its bytes: half of it says enough."""
    return hasher.hexdigest()[: len(_NO_CHECKSUM)]


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a single call may write less."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _digest_of(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest=_NO_DIGEST)
    return hashlib.blake2b(msgspec.json.encode(bare, order="sorted"), digest_size=32).hexdigest()


def _inconsistency(manifest: Manifest, weights_end: int) -> str:
    if manifest.format != FORMAT:
        return f"it is of format {manifest.format}, and format {FORMAT} is understood"
    if manifest.digest != _digest_of(manifest):
        return "its digest does not match"
    position = 0
    spans: dict[int, tuple[int, int]] = {}
    for span in manifest.layers:
        if span.offset_bytes != position or span.bytes < 0 or span.bytes % LAYER_ALIGNMENT_BYTES:
            return f"layer {span.layer} does not follow the one before"
        position += span.bytes
        if span.layer in spans:
            return f"layer {span.layer} is there twice"
        spans[span.layer] = (span.offset_bytes, position)
    if position != manifest.weights_bytes or position != weights_end:
        return f"its layers end at {position}, its weights at {manifest.weights_bytes}"
    free_from = 0
    for entry in manifest.tensors:
        if entry.dtype not in ITEM_BYTES or any(dimension < 0 for dimension in entry.shape):
            return f"tensor {entry.name} has a shape or dtype that no tensor has"
        start, end = spans.get(entry.layer, (0, -1))
        if (
            entry.offset_bytes < max(free_from, start)
            or entry.offset_bytes % TENSOR_ALIGNMENT_BYTES
            or entry.offset_bytes + entry.size_bytes > end
        ):
            return f"tensor {entry.name} lies outside its layer or over another tensor"
        free_from = entry.offset_bytes + entry.size_bytes
    if len({entry.name for entry in manifest.tensors}) != len(manifest.tensors):
        return "two tensors have the same name"
    return ""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
