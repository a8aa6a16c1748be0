"""Images of a small checkpoint, packed and not: pieces of many kinds, one that nothing packs."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file

from swap.build import build_image
from swap.checkpoint import Checkpoint
from swap.image import (
    TensorRecipe,
    plan_image,
    segment_bytes,
)
from swap.segment import Segment

BLOCK = 4096
PIECE = 4 * BLOCK
SHAPES = {
    "embedding": (-1, (96, 1024)),
    "a": (0, (70, 1000)),
    "norm": (0, (33,)),
    "nothing": (0, (0, 7)),
    "noise": (1, (50, 1024)),
    "b": (1, (64, 1024)),
    "last": (2, (1024,)),
}
RECIPES = [TensorRecipe(name, layer, (name,), shape) for name, (layer, shape) in SHAPES.items()]


def bits_of(name, shape, seed=0):
    count = int(np.prod(shape))
    draw = np.random.default_rng([seed, len(name), count])
    if name == "noise":  # what no code makes smaller
        return draw.integers(0, 1 << 16, shape, np.uint16)
    return (draw.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def images_in(tmp_path):
    """Builds images, packed or not, of bfloat16 (as float32 in the checkpoint's files)."""
    segments = []

    def make(packed=True, seed=0):
        directory = tmp_path / f"{seed}"
        directory.mkdir(exist_ok=True)
        tensors = {}
        for name, (_, shape) in SHAPES.items():
            wide = bits_of(name, shape, seed).astype(np.uint32) << np.uint32(16)
            # Signalling NaN and such would be rounded on the way from float32; noise without them.
            tensors[name] = np.where(np.isnan(wide.view(np.float32)), np.uint32(0x7FC00000), wide)
        save_file(
            {name: tensor.view(np.float32) for name, tensor in tensors.items()},
            directory / "model.safetensors",
        )
        layout = plan_image(RECIPES, "bfloat16", {}, piece_weights=PIECE if packed else 0)
        segment = Segment.create(segment_bytes(layout), "test")
        segments.append(segment)
        with Checkpoint.open(directory) as checkpoint:
            return build_image(checkpoint, RECIPES, layout, segment), segment, layout

    yield make
    for segment in segments:
        segment.close()
