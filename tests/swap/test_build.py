"""Images built from real checkpoints: right to the bit, bounded in memory, and all or nothing."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import swap.checkpoint
from swap.build import build_image, check_sources
from swap.checkpoint import Checkpoint
from swap.errors import BuildCancelled, CheckpointInvalid, CorruptWeights, InsufficientHostMemory
from swap.image import TensorRecipe, plan_image, read_manifest, segment_bytes
from swap.image_check import verify_image
from swap.segment import Segment

RECIPES = (
    TensorRecipe("embedding", -1, ("embed",), (64, 32)),
    TensorRecipe("qkv", 0, ("0.q", "0.k", "0.v"), (64, 32)),
    TensorRecipe("w", 1, ("1.w",), (48, 32)),
    TensorRecipe("norm", 2, ("norm",), (32,)),
)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def checkpoint(checkpoint_directory):
    with Checkpoint.open(checkpoint_directory) as opened:
        yield opened


@pytest.fixture
def segment():
    """Makes segments of a layout's size; closed afterwards."""
    made = []

    def make(layout):
        made.append(Segment.create(segment_bytes(layout), "test"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("chunk_bytes", [4096, 4 << 20])
@pytest.mark.parametrize("dtype", list(TORCH))
def test_the_image_holds_the_fused_and_cast_weights(
    checkpoint_directory, checkpoint, segment, monkeypatch, dtype, chunk_bytes
):
    monkeypatch.setattr(swap.checkpoint, "CHUNK_BYTES", chunk_bytes)
    layout = plan_image(RECIPES, dtype, {"family": "test"})
    target = segment(layout)
    told = []
    manifest = build_image(
        checkpoint, RECIPES, layout, target, progress=lambda done, total: told.append((done, total))
    )
    assert target.sealed
    assert read_manifest(target.descriptor) == manifest
    assert manifest.model == {"family": "test"}
    verify_image(target.descriptor, manifest)
    source = load_file(checkpoint_directory / "model.safetensors")
    with target.map() as mapping:
        for recipe, entry in zip(RECIPES, manifest.tensors, strict=True):
            fused = np.concatenate([source[name] for name in recipe.sources])
            expected = torch.from_numpy(fused).to(TORCH[dtype])
            found = torch.frombuffer(
                bytearray(mapping.view(entry.offset_bytes, entry.size_bytes)), dtype=TORCH[dtype]
            ).reshape(entry.shape)
            assert torch.equal(found, expected)
    total = sum(entry.size_bytes for entry in manifest.tensors)
    assert told[-1] == (total, total)


def test_building_twice_gives_the_same_digest(checkpoint, segment):
    layout = plan_image(RECIPES, "float32")
    digests = {build_image(checkpoint, RECIPES, layout, segment(layout)).digest for _ in range(3)}
    assert len(digests) == 1
    half = plan_image(RECIPES, "bfloat16")
    assert build_image(checkpoint, RECIPES, half, segment(half)).digest not in digests


@pytest.mark.parametrize(
    ("recipe", "tensor", "expected", "found"),
    [
        (TensorRecipe("x", 0, ("gone",), (4,)), "gone", "[4]", "nothing"),
        (TensorRecipe("x", 0, ("norm",), (33,)), "norm", "[33]", "[32]"),
        (TensorRecipe("x", 0, ("norm",), (32, 1)), "norm", "[32, 1]", "[32]"),
        (TensorRecipe("x", 0, ("embed",), (64, 33)), "embed", "[64, 33]", "[64, 32]"),
        (
            TensorRecipe("x", 0, ("0.q", "0.k"), (64, 32)),
            "0.q + 0.k",
            "[64, 32]",
            "[32, 32] + [16, 32]",
        ),
    ],
)
def test_a_checkpoint_without_the_tensors_is_refused(checkpoint, recipe, tensor, expected, found):
    with pytest.raises(CheckpointInvalid) as refused:
        check_sources(checkpoint, (*RECIPES, recipe))
    assert refused.value.metadata == {"tensor": tensor, "expected": expected, "found": found}
    assert tensor in str(refused.value)
    assert found in str(refused.value)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    save_file({"w": np.zeros((4, 4), np.int64)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as opened, pytest.raises(CheckpointInvalid, match="found I64"):
        check_sources(opened, [TensorRecipe("w", 0, ("w",), (4, 4))])


def test_a_cancelled_build_leaves_no_image(checkpoint, segment):
    layout = plan_image(RECIPES, "float32")
    target = segment(layout)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(BuildCancelled):
        build_image(checkpoint, RECIPES, layout, target, cancelled=cancelled)
    assert not target.sealed
    with pytest.raises(CorruptWeights):
        read_manifest(target.descriptor)


def test_a_checkpoint_cut_during_the_build_leaves_no_image(
    checkpoint_directory, checkpoint, segment
):
    layout = plan_image(RECIPES, "float32")
    target = segment(layout)
    os.truncate(checkpoint_directory / "model.safetensors", 2000)
    before = set(threading.enumerate())
    with pytest.raises(CheckpointInvalid, match="became shorter"):
        build_image(checkpoint, RECIPES, layout, target)
    assert not target.sealed
    assert set(threading.enumerate()) <= before


def test_a_host_without_memory_says_so(checkpoint, segment, monkeypatch):
    layout = plan_image(RECIPES, "float32")
    target = segment(layout)

    def full(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swap.build.write_all", full)
    with pytest.raises(InsufficientHostMemory) as refused:
        build_image(checkpoint, RECIPES, layout, target)
    assert refused.value.metadata == {"needed_bytes": str(target.size_bytes)}


def test_a_segment_of_another_size_is_refused(checkpoint):
    layout = plan_image(RECIPES, "float32")
    with Segment.create(4096, "small") as small, pytest.raises(ValueError, match="that size"):
        build_image(checkpoint, RECIPES, layout, small)


def test_threads_build_at_the_same_time_in_bounded_memory(tmp_path, segment):
    """64 MiB of weights through chunks of 4 MiB: the process must not grow by the model."""
    numbers = np.random.default_rng(1)
    tensors = {f"w{i}": numbers.standard_normal((1024, 2048), dtype=np.float32) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    recipes = [TensorRecipe(f"t{i}", i, (f"w{i}",), (1024, 2048)) for i in range(8)]
    layout = plan_image(recipes, "bfloat16")
    target = segment(layout)
    names, peak = set(), [0]
    page_bytes = os.sysconf("SC_PAGE_SIZE")

    def anonymous_bytes() -> int:
        with open("/proc/self/statm") as statm:
            _, resident, shared, *_ = statm.read().split()
        return (int(resident) - int(shared)) * page_bytes

    before = anonymous_bytes()

    def progress(done: int, total: int) -> None:
        names.add(threading.current_thread().name)
        peak[0] = max(peak[0], anonymous_bytes())

    with Checkpoint.open(tmp_path) as opened:
        build_image(opened, recipes, layout, target, progress=progress)
    assert peak[0] - before < 48 << 20
    assert names
