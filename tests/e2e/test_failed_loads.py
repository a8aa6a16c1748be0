"""Loads that cannot succeed: what serves goes on, the answer says why, nothing leaks."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hotbay.errors import HotbayError, OperationFailed, Refused
from hotbay.local_node import LocalNode
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.conftest import REPOSITORY, NodeMaker, Oracle
from tests.gpuctl.conftest import in_process

SETTLE_S = 120.0


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def tensor_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def wrong_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def unsupported(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["MambaForCausalLM"]
    config["model_type"] = "mamba"
    path.write_text(json.dumps(config))


def header_of(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a file, and nothing else of it."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def overlapping(directory: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        begin, end = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin - 4, end - 4]

    header_of(directory, overlap)


def not_text(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(9)
        file.write(b"\xff\xfe")


def too_few_layers(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))


def shards(name: str) -> Callable[[Path], None]:
    """An index that puts everything into the shard of that name."""

    def spoil(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        index = {"weight_map": dict.fromkeys(names, name)}
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "model.safetensors"),
    "missing": (tensor_missing, "model.norm.weight"),
    "shape": (wrong_shape, "model.norm.weight"),
    "unsupported": (unsupported, "Mamba"),
    "overlap": (overlapping, "overlaps the one before"),
    "text": (not_text, "model.safetensors: its header is no JSON object"),
    "layers": (too_few_layers, "model.layers.1."),
    "missing-shard": (shards("model-00001-of-00002.safetensors"), "00001-of-00002"),
    "outside": (shards("../../prose/1/model.safetensors"), "no file name"),
}


def counts(node: LocalNode) -> dict[str, object]:
    """What could leak: descriptors and children of every process, host and device bytes."""
    found = node.client.node()
    pids = {f"{p.role} {p.partition}".strip(): p.pid for p in found.processes}
    return {
        "descriptors": {name: psutil.Process(pid).num_fds() for name, pid in pids.items()},
        "children": {
            name: len(psutil.Process(pid).children(recursive=True)) for name, pid in pids.items()
        },
        "host": found.host_store.used_bytes,
        "images": len(found.host_store.images),
        "free": node.client.partition("gpu0").memory_free_bytes,
    }


def settled_counts(node: LocalNode) -> dict[str, object]:
    """The counts once they stand still: connections end a little after their answers."""
    last = counts(node)
    for _ in range(50):
        time.sleep(0.3)
        found = counts(node)
        if found == last:
            return found
        last = found
    raise AssertionError(f"the counts never stand still: {last}")


def unchanged(node: LocalNode, before: dict[str, object]) -> None:
    """Counts are where they were, once connections that end have ended."""
    deadline_s = time.monotonic() + SETTLE_S
    while (found := counts(node)) != before and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert found == before


def refused(node: LocalNode, model: str) -> HotbayError:
    with pytest.raises((Refused, OperationFailed)) as caught:
        node.client.wait(node.client.load(model))
    return caught.value


def still_serves(node: LocalNode, oracle: Oracle) -> None:
    response = httpx.post(
        f"{node.http_url}/v1/completions",
        json={"model": "prose", "prompt": "The licence", "max_tokens": 16, "temperature": 0},
        timeout=60,
    )
    assert response.json()["choices"][0]["text"] == oracle.answer("prose", "The licence", 16)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    shutil.copytree(REPOSITORY / "prose", root / "prose")
    for name, (spoil, _) in BROKEN.items():
        shutil.copytree(REPOSITORY / "code", root / name)
        spoil(root / name / "1")
    shutil.copytree(REPOSITORY / "code", root / "code")
    return root


@pytest.mark.slow
def test_broken_checkpoints_are_refused_by_name(
    start_node: NodeMaker, repository: Path, oracle: Oracle
) -> None:
    node = start_node(repository=repository, load=("prose",))
    still_serves(node, oracle)
    for name in BROKEN:  # once beforehand, so that lazy imports and pools are not counted
        refused(node, name)
    before = settled_counts(node)
    for name, (_, named) in BROKEN.items():
        error = refused(node, name)
        assert named in str(error), error
        assert error.reason in ("CHECKPOINT_INVALID", "CORRUPT_WEIGHTS", "ARCH_UNSUPPORTED")
        shown = in_process(node.endpoint)("load", name)
        assert shown.code == 4
        assert named in shown.err
        assert "  what to do:  " in shown.err
    still_serves(node, oracle)
    unchanged(node, before)


def write_large(directory: Path) -> None:
    """A checkpoint of 9 M parameters, 36 MB in float32, with a tokenizer it does not fit."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    shutil.copy(REPOSITORY / "prose" / "1" / "tokenizer.json", directory)


@pytest.mark.slow
def test_a_model_larger_than_the_partition(
    start_node: NodeMaker, repository: Path, oracle: Oracle
) -> None:
    write_large(repository / "large" / "1")
    node = start_node(
        repository=repository,
        config={
            "worker": {"memory_bytes": 24 << 20},
            "scheduling": {"swap_on_demand": False},
        },
        load=("prose",),
    )
    still_serves(node, oracle)
    refused(node, "large")
    before = settled_counts(node)
    error = refused(node, "large")
    assert error.reason == "INSUFFICIENT_DEVICE_MEMORY"
    assert int(error.metadata["needed_bytes"]) > 24 << 20
    assert error.metadata["needed_bytes"] in str(error)
    still_serves(node, oracle)
    unchanged(node, before)


@pytest.mark.slow
def test_a_model_larger_than_the_host_budget(
    start_node: NodeMaker, repository: Path, oracle: Oracle
) -> None:
    image_bytes = 0
    probe = start_node(repository=repository)
    for model in probe.client.models():
        if model.name == "prose":
            image_bytes = model.versions[0].image_bytes
    assert image_bytes > 0
    node = start_node(
        repository=repository,
        config={
            "host_store": {"budget_bytes": image_bytes + (1 << 20)},
            "scheduling": {"swap_on_demand": False},
        },
        load=("prose",),
    )
    before = settled_counts(node)
    error = refused(node, "code")
    assert error.reason == "INSUFFICIENT_HOST_MEMORY"
    assert int(error.metadata["budget_bytes"]) == image_bytes + (1 << 20)
    still_serves(node, oracle)
    unchanged(node, before)
