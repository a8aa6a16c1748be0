"""What an image is: fused tensors in the order they are needed, and the manifest that says so.

It owns the layout and the bytes of the manifest; it never reads a checkpoint.
A segment holds the weights, then the manifest as JSON, then a trailer of fixed size at its very
end, so that a bare descriptor describes itself. Tensors start at multiples of 256 bytes and each
layer's span at a multiple of 4096. Invariant: a manifest that was read is consistent (no tensor
lies outside its layer, no layer outside the weights), so a reader may copy by it without looking.

An image may be packed: then the segment holds, instead of the weights as they lie on the device,
every tensor as pieces (see `swap.packing`), and `swap.pieces` says which piece becomes what. All
offsets in the manifest are of unpacked weights, and so are the checksums.
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

from swap.checksum import CHECKSUM_CHARACTERS
from swap.errors import CorruptWeights

FORMAT = 3
"""1 and 2 had SHA-256 for checksums; such images are refused, and built again."""
TENSOR_ALIGNMENT_BYTES = 256
LAYER_ALIGNMENT_BYTES = 4096
MANIFEST_BYTES_MAX = 64 << 20
DIMENSIONS_MAX = 16
EMBEDDING_LAYER = -1

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes weights can have in an image, and the bytes of one element."""

_TRAILER = struct.Struct("<8sQQI4x")  # magic, manifest offset, manifest bytes, CRC-32 of it
_MAGIC = b"HOTBAYIM"
_NO_CHECKSUM = "0" * CHECKSUM_CHARACTERS
_NO_DIGEST = "0" * 64
WEIGHT_BYTES = 2
BLOCK_WEIGHTS = 4096
"""Of packed weights: bytes of one that is not, and what a piece is whole blocks of."""
PIECE_WEIGHTS = 8 << 20
PIECE_WEIGHTS_MAX = 64 << 20
"""What a packed piece holds, unless less is left of its tensor; and what one may hold at most."""


class TensorRecipe(msgspec.Struct, frozen=True):
    """One tensor of the engine, made of checkpoint tensors stacked along their first dimension."""

    name: str
    layer: int
    """-1 is the embedding, 0 to n-1 the layers, n what comes after them."""
    sources: tuple[str, ...]
    shape: tuple[int, ...]


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a tensor lies in the image. `checksum` is as in `swap.checksum`."""

    name: str
    layer: int
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: str
    checksum: str
    pieces: tuple[int, ...] = ()
    """Of a packed image: the bytes of each piece. One as large as its weights is not packed."""
    stored_checksum: str = ""
    """Of a packed image: of the tensor's pieces as they lie in the segment, from the first one's
    first byte to the last one's last, so that reading them back need not unpack them."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class LayerSpan(msgspec.Struct, frozen=True):
    """The bytes of one layer, padding included; copying it brings all of the layer's tensors."""

    layer: int
    offset_bytes: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
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
    piece_weights: int = 0
    """Weights that a piece holds, unless less is left of its tensor; 0: not a packed image."""

    @property
    def packed(self) -> bool:
        return self.piece_weights > 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the segment before the manifest: what crosses the link."""
        if not self.packed:
            return self.weights_bytes
        sizes = (stored for entry in self.tensors for stored in entry.pieces)
        return sum(_round_up(stored, TENSOR_ALIGNMENT_BYTES) for stored in sizes)


def plan_image(
    recipes: Iterable[TensorRecipe],
    dtype: str,
    model: dict[str, Any] | None = None,
    *,
    piece_weights: int = 0,
) -> Manifest:
    """Lay tensors out by layer, then in the order given. Checksums and digest are not set yet.

    `model` must be plain JSON data. With `piece_weights` the image is to be packed; the layout then
    has pieces of the size they have at most. Raises ValueError for a dtype no image has (or no
    packed one), a name given twice or no recipes at all: mistakes of the engine, not of a
    checkpoint.
    """
    if piece_weights and (dtype != "bfloat16" or not _piece_weights_valid(piece_weights)):
        raise ValueError(f"{dtype} cannot be packed in pieces of {piece_weights} weights")
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
        pieces = raw_pieces(math.prod(recipe.shape), piece_weights)
        entry = TensorEntry(
            recipe.name,
            recipe.layer,
            offset,
            recipe.shape,
            dtype,
            _NO_CHECKSUM,
            pieces,
            _NO_CHECKSUM if piece_weights else "",
        )
        tensors.append(entry)
        offset += entry.size_bytes
        if index + 1 == len(ordered) or ordered[index + 1].layer != recipe.layer:
            offset = _round_up(offset, LAYER_ALIGNMENT_BYTES)
            layers.append(LayerSpan(recipe.layer, start, offset - start))
            start = offset
    # What comes back from the manifest must be what was hashed: JSON data, with keys as text.
    described: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(model or {}))
    return Manifest(
        FORMAT,
        _NO_DIGEST,
        dtype,
        offset,
        tuple(tensors),
        tuple(layers),
        described,
        piece_weights,
    )


def raw_pieces(weights: int, piece_weights: int) -> tuple[int, ...]:
    """Bytes of each piece of a tensor if none is packed; no piece without `piece_weights`."""
    if not piece_weights:
        return ()
    starts = range(0, weights, piece_weights)
    return tuple(min(piece_weights, weights - start) * WEIGHT_BYTES for start in starts)


def complete(
    layout: Manifest,
    checksums: dict[str, str],
    pieces: dict[str, tuple[int, ...]] | None = None,
    stored_checksums: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a built image: the layout with every tensor's checksum, and its digest.

    For a packed image with the bytes of every tensor's pieces and their checksum, too.
    """
    tensors = tuple(
        msgspec.structs.replace(
            entry,
            checksum=checksums[entry.name],
            pieces=entry.pieces if pieces is None else pieces[entry.name],
            stored_checksum=(
                entry.stored_checksum if stored_checksums is None else stored_checksums[entry.name]
            ),
        )
        for entry in layout.tensors
    )
    manifest = msgspec.structs.replace(layout, tensors=tensors, digest=_NO_DIGEST)
    return msgspec.structs.replace(manifest, digest=_digest_of(manifest))


def same_layout(manifest: Manifest, layout: Manifest) -> bool:
    """Whether an image is what `layout` plans: all alike but for what only building shows, which
    is checksums, the sizes of pieces, and the digest."""
    tensors = tuple(
        msgspec.structs.replace(
            entry,
            checksum=_NO_CHECKSUM,
            stored_checksum=_NO_CHECKSUM if manifest.packed else "",
            pieces=raw_pieces(math.prod(entry.shape), manifest.piece_weights),
        )
        for entry in manifest.tensors
    )
    return msgspec.structs.replace(manifest, tensors=tensors, digest=_NO_DIGEST) == layout


def segment_bytes(layout: Manifest) -> int:
    """Size of the segment an image takes; known before it is built, since hashes have one size.

    For the layout of a packed image it is what the image takes at most.
    """
    used = layout.stored_bytes + len(msgspec.json.encode(layout)) + _TRAILER.size
    return _round_up(used, LAYER_ALIGNMENT_BYTES)


def image_tail(manifest: Manifest) -> bytes:
    """What follows the weights in a file of `segment_bytes`, to its end."""
    encoded, trailer = manifest_and_trailer(manifest)
    padding = segment_bytes(manifest) - manifest.stored_bytes - len(encoded) - len(trailer)
    return encoded + bytes(padding) + trailer


def manifest_and_trailer(manifest: Manifest) -> tuple[bytes, bytes]:
    """The two things that make weights in a segment an image; the trailer goes to its very end."""
    encoded = msgspec.json.encode(manifest)
    crc = zlib.crc32(encoded)
    return encoded, _TRAILER.pack(_MAGIC, manifest.stored_bytes, len(encoded), crc)


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


def _digest_of(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest=_NO_DIGEST)
    return hashlib.blake2b(msgspec.json.encode(bare, order="sorted"), digest_size=32).hexdigest()


def _inconsistency(manifest: Manifest, weights_end: int) -> str:
    if manifest.format != FORMAT:
        return (
            f"it is of format {manifest.format}, made by another release, and format {FORMAT} is "
            "understood: build the image again"
        )
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
    if position != manifest.weights_bytes or manifest.stored_bytes != weights_end:
        return f"its layers end at {position}, its weights at {manifest.weights_bytes}"
    free_from = 0
    for entry in manifest.tensors:
        known = entry.dtype in ITEM_BYTES and len(entry.shape) <= DIMENSIONS_MAX
        if not known or any(dimension < 0 for dimension in entry.shape):
            return f"tensor {entry.name} has a shape or dtype that no tensor has"
        start, end = spans.get(entry.layer, (0, -1))
        if (
            entry.offset_bytes < max(free_from, start)
            or entry.offset_bytes % TENSOR_ALIGNMENT_BYTES
            or entry.offset_bytes + entry.size_bytes > end
        ):
            return f"tensor {entry.name} lies outside its layer or over another tensor"
        if not _pieces_valid(entry, manifest.piece_weights):
            return f"tensor {entry.name} has pieces that do not make it up"
        free_from = entry.offset_bytes + entry.size_bytes
    if len({entry.name for entry in manifest.tensors}) != len(manifest.tensors):
        return "two tensors have the same name"
    return ""


def _pieces_valid(entry: TensorEntry, piece_weights: int) -> bool:
    if piece_weights and (entry.dtype != "bfloat16" or not _piece_weights_valid(piece_weights)):
        return False
    weights = math.prod(entry.shape)
    # Counted first: a shape that lies must not make a list as long as it says.
    if len(entry.pieces) != (-(-weights // piece_weights) if piece_weights else 0):
        return False
    raw = raw_pieces(weights, piece_weights)
    return all(0 < stored <= most for stored, most in zip(entry.pieces, raw, strict=True))


def _piece_weights_valid(piece_weights: int) -> bool:
    return 0 < piece_weights <= PIECE_WEIGHTS_MAX and piece_weights % BLOCK_WEIGHTS == 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
