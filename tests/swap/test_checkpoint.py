"""Checkpoints on disk, whole, sharded, damaged and hostile; safetensors is the oracle."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import swap.checkpoint
from swap.checkpoint import Checkpoint
from swap.errors import CheckpointInvalid
from tests.support.descriptors import open_descriptors

INDEX = "model.safetensors.index.json"


def read(checkpoint: Checkpoint, name: str, dtype: str = "float32") -> bytes:
    tensor = checkpoint.tensors[name]
    elements = int(np.prod(tensor.shape, dtype=np.int64))
    content = bytearray(elements * (4 if dtype == "float32" else 2))
    checkpoint.read_into(name, memoryview(content), dtype)
    return bytes(content)


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Two shards with their index; returns the directory and the tensors."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    tensors = {f"t{i}": np.full((i + 1, 3), i, np.float32) for i in range(6)}
    shards = {"model-2.safetensors": ["t0", "t3"], "model-1.safetensors": ["t1", "t2", "t4", "t5"]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory, tensors


@pytest.mark.parametrize("chunk_bytes", [4, 1000, 4 << 20])
def test_every_tensor_is_read_as_the_library_reads_it(
    checkpoint_directory, monkeypatch, chunk_bytes
):
    monkeypatch.setattr(swap.checkpoint, "CHUNK_BYTES", chunk_bytes)
    expected = load_file(checkpoint_directory / "model.safetensors")
    with Checkpoint.open(checkpoint_directory) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert checkpoint.tensors[name].shape == tensor.shape
            assert read(checkpoint, name) == tensor.tobytes()
        size = (checkpoint_directory / "model.safetensors").stat().st_size
        assert checkpoint.size_bytes == size


def test_half_precision_files_are_cast(tmp_path):
    source = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
    tensors = {"b": source.to(torch.bfloat16), "h": source.to(torch.float16)}
    save_torch(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert read(checkpoint, name) == tensor.float().numpy().tobytes()
            half = tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            assert read(checkpoint, name, "bfloat16") == half


def test_scalars_empty_tensors_and_wrong_destinations(tmp_path):
    tensors = {
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert read(checkpoint, "scalar") == np.float32(3.5).tobytes()
        assert read(checkpoint, "empty") == b""
        with pytest.raises(CheckpointInvalid, match="I64"):
            checkpoint.read_into("ids", memoryview(bytearray(12)), "float32")
        with pytest.raises(ValueError, match="takes 4 bytes, not 5"):
            checkpoint.read_into("scalar", memoryview(bytearray(5)), "float32")
        with pytest.raises(CheckpointInvalid, match="no tensor other"):
            checkpoint.read_into("other", memoryview(bytearray(4)), "float32")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read_into("scalar", memoryview(bytearray(4)), "float32")


def test_shards_are_read_together(sharded):
    directory, tensors = sharded
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read(checkpoint, name) == tensor.tobytes()
        assert {checkpoint.tensors[name].file for name in ("t1", "t5")} == {0}


def test_downloads_kept_as_links_to_blobs_are_read(checkpoint_directory, tmp_path):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(checkpoint_directory / "model.safetensors")
    with Checkpoint.open(linked) as checkpoint:
        assert len(checkpoint.tensors) == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: i["weight_map"].update(t1="model-2.safetensors"), "t1 is in model-2"),
        (lambda i: i["weight_map"].update(t9="model-1.safetensors"), "t9 is in model-1"),
        (lambda i: i["weight_map"].update(t9="model-3.safetensors"), "cannot be opened"),
        (lambda i: i["weight_map"].update(t9="../model.safetensors"), "no file name"),
        (lambda i: i["weight_map"].update(t9="/etc/passwd"), "no file name"),
        (lambda i: i["weight_map"].update(t9="sub/a.safetensors"), "no file name"),
        (lambda i: i["weight_map"].update(t9="a\0.safetensors"), "no file name"),
        (lambda i: i["weight_map"].update(t9=".."), "no file name"),
        (lambda i: i["weight_map"].update(t9=7), "no file name"),
        (lambda i: i.update(weight_map={}), "no weight_map"),
        (lambda i: i.update(weight_map=[1]), "no weight_map"),
        (
            lambda i: i["weight_map"].update({f"x{n}": f"{n}.safetensors" for n in range(600)}),
            "over the limit 512",
        ),
    ],
)
def test_an_index_that_lies_is_refused(sharded, change, says):
    directory, _ = sharded
    before = len(open_descriptors())
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointInvalid, match=says):
        Checkpoint.open(directory)
    assert len(open_descriptors()) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "occurs twice"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, says):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointInvalid, match=says):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(sharded):
    directory, tensors = sharded
    save_file(
        {name: tensors[name] for name in ("t0", "t3", "t5")}, directory / "model-2.safetensors"
    )
    with pytest.raises(CheckpointInvalid, match=r"t5 is both in model-1.* and in model-2"):
        Checkpoint.open(directory)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointInvalid, match="has neither"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointInvalid, match="has neither"):
        Checkpoint.open(tmp_path / "nowhere")
    before = len(open_descriptors())
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(CheckpointInvalid, match="no regular file"):
        Checkpoint.open(tmp_path)
    path.rmdir()
    os.mkfifo(path)  # opening it must not wait for a writer
    with pytest.raises(CheckpointInvalid, match="no regular file"):
        Checkpoint.open(tmp_path)
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(CheckpointInvalid, match="too few"):
        Checkpoint.open(tmp_path)
    assert len(open_descriptors()) == before


def test_a_file_cut_anywhere_is_refused(checkpoint_directory, tmp_path):
    content = (checkpoint_directory / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    choose = random.Random(4)
    for size in [
        0,
        7,
        8,
        header - 1,
        header,
        len(content) - 1,
        *choose.sample(range(len(content)), 40),
    ]:
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(CheckpointInvalid, match=r"model\.safetensors"):
            Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content + b"\0")
    with pytest.raises(CheckpointInvalid, match="behind its last"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(checkpoint_directory, tmp_path):
    shutil.copytree(checkpoint_directory, tmp_path / "copy")
    with Checkpoint.open(tmp_path / "copy") as checkpoint:
        os.truncate(tmp_path / "copy" / "model.safetensors", 1000)
        with pytest.raises(CheckpointInvalid, match="became shorter"):
            read(checkpoint, "embed")
