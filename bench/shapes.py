"""The synthetic models that benchmarks swap: shapes of real sizes, and images of random weights.

It owns the shapes and how images of them are made fast enough for tens of GB: one random block,
begun at another place for each tensor, written or packed, and hashed, by a thread per core.
Invariant: an image is a whole one, with every checksum; only its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Literal

import msgspec
import numpy as np

from bench.worker import RANDOM_BYTES, BuiltModel, decoder, encoded
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec, Rope
from swap.checksum import TensorHasher
from swap.image import (
    PIECE_WEIGHTS,
    Manifest,
    TensorEntry,
    complete,
    plan_image,
    segment_bytes,
)
from swap.piece_writer import PieceWriter, close_gaps
from swap.pieces import place_pieces
from swap.segment import Segment
from swap.writing import write_all as write_at
from swap.writing import write_manifest

Dtype = Literal["float32", "bfloat16"]

HOST_SHAPES: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    # By GiB of weights in float32: vocabulary, hidden, layers.
    {1: (32_000, 1024, 13), 4: (32_000, 2048, 15)}
)
GPU_SHAPES: Mapping[str, tuple[int, int, int, int, int, bool]] = MappingProxyType(
    # Layers, hidden, heads, head_dim, intermediate, tied; 8 heads of keys, 128256 tokens. The first
    # two are those of Llama 3.2 1B and Llama 3.1 8B, the third is a dense model's of 30 billion.
    {
        "1B": (16, 2048, 32, 64, 8192, True),
        "8B": (32, 4096, 32, 128, 14336, False),
        "30B": (60, 6144, 48, 128, 20480, False),
    }
)
TINY = (512, 128, 4)
"""Vocabulary, hidden and layers of what dry runs use instead."""
CONTEXT_TOKENS = 4096


def host_shape(gib: int) -> ModelSpec:
    """A decoder whose weights take `gib` GiB in float32."""
    return decoder(*HOST_SHAPES[gib])


def gpu_shape(name: str, *, tiny: bool = False) -> ModelSpec:
    """A decoder of GPU_SHAPES, or what stands for any of them in a dry run."""
    if tiny:
        return dataclasses.replace(decoder(*TINY), context_tokens=CONTEXT_TOKENS)
    layers, hidden, heads, head_dim, intermediate, tied = GPU_SHAPES[name]
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=128_256,
        context_tokens=CONTEXT_TOKENS,
        tied=tied,
        norm_epsilon=1e-5,
        rope=Rope(theta=500_000.0),
        eos_token_ids=(),
    )


def large_model(
    model: str, spec: ModelSpec, seed: int, dtype: Dtype, *, packed: bool = False
) -> BuiltModel:
    """An image of normal weights in a sealed segment; norms are ones."""
    piece_weights = PIECE_WEIGHTS if packed else 0
    layout = plan_image(image_recipes(spec), dtype, spec.to_dict(), piece_weights=piece_weights)
    return write_random(model, layout, seed)


def fp8_layout(spec: ModelSpec) -> Manifest:
    """A layout with the bytes of an image in fp8, a byte for each weight.

    No image has that dtype yet: it is one in bfloat16 with half as many rows in each tensor, which
    is the same to a copy.
    """
    recipes = [
        msgspec.structs.replace(one, shape=(-(-one.shape[0] // 2), *one.shape[1:]))
        for one in image_recipes(spec)
    ]
    return plan_image(recipes, "bfloat16")


def write_random(model: str, layout: Manifest, seed: int) -> BuiltModel:
    """Fill a layout with random weights, into a segment of its own."""
    segment = Segment.create(segment_bytes(layout), model)
    draw = np.random.default_rng(seed)
    block = encoded(0.05 * draw.standard_normal(RANDOM_BYTES // 4, dtype=np.float32), layout.dtype)

    places = {piece.tensor.name: piece for piece in reversed(place_pieces(layout))}
    sizes: dict[str, tuple[int, ...]] = {}
    stored_checksums: dict[str, str] = {}

    def write(entry: TensorEntry) -> tuple[str, str]:
        hasher, offset = TensorHasher(), entry.offset_bytes
        writer = None
        if layout.packed:
            place = places[entry.name].stored_offset_bytes
            writer = PieceWriter(segment.descriptor, entry, place, layout.piece_weights)
        for piece in _pieces(entry, block):
            if writer is None:
                write_at(segment.descriptor, piece, offset)
            else:
                writer.write(piece)
            hasher.update(piece)
            offset += len(piece)
        if writer is not None:
            sizes[entry.name] = writer.finish()
            stored_checksums[entry.name] = writer.stored_checksum
        return entry.name, hasher.checksum()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        checksums = dict(threads.map(write, layout.tensors))
    if layout.packed:
        manifest = complete(layout, checksums, sizes, stored_checksums)
        close_gaps(segment, layout, manifest)
    else:
        manifest = complete(layout, checksums)
    write_manifest(segment.descriptor, manifest)
    segment.seal()
    return BuiltModel(model, segment, manifest)


def _pieces(entry: TensorEntry, block: bytes) -> Iterator[memoryview]:
    """A tensor's bytes: ones for a norm, else the block from a place of the tensor's own on."""
    if "norm" in entry.name:
        yield memoryview(encoded(np.ones(entry.shape, dtype=np.float32), entry.dtype))
        return
    # A whole number of elements in, or the numbers would be others, and some not finite.
    start = zlib.crc32(entry.name.encode()) % len(block) // 4 * 4
    left, whole = entry.size_bytes, memoryview(block)
    while left:
        piece = whole[start : start + left]
        yield piece
        left, start = left - len(piece), 0


def same_image(built: BuiltModel, model: str) -> BuiltModel:
    """Another model of the same image: no swap can tell, and it takes no memory of its own."""
    return BuiltModel(model, built.segment, built.manifest)
