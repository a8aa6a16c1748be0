"""A whole node and its images on disk: what is read back, and what never is."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import httpx
from hotbay.local_node import LocalNode

from swap.identity import SETTLE_S
from tests.e2e.conftest import PROMPTS, REPOSITORY, NodeMaker, Oracle

PROMPT = PROMPTS["prose"][0]
TOKENS = 12
WRITTEN_TIMEOUT_S = 120.0
CACHE_BYTES = 256 << 20
ALTERED_BYTES = 200_000


def ask(node: LocalNode) -> str:
    body = {"model": "prose", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{node.http_url}/v1/completions", json=body, timeout=100)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def loads(node: LocalNode, origin: str) -> float:
    """Images that this daemon brought to memory from there."""
    text = httpx.get(f"{node.http_url}/metrics", timeout=100).text
    line = f'hotbay_image_loads_total{{origin="{origin}"}}'
    return next(float(each.split()[1]) for each in text.splitlines() if each.startswith(line))


def images(node: LocalNode) -> list[Path]:
    return sorted(Path(node.directory).rglob("*.image"))


def written(node: LocalNode, count: int) -> list[Path]:
    """The images on disk, once there are so many."""
    deadline = time.monotonic() + WRITTEN_TIMEOUT_S
    while len(images(node)) < count or len(list(Path(node.directory).rglob("*.key"))) < count:
        assert time.monotonic() < deadline, "the image was not written"
        time.sleep(0.05)
    return images(node)


def stopped(node: LocalNode) -> LocalNode:
    """A new node on the directories of one that is ended first, whole."""
    node.stop()
    return LocalNode(node.directory, config=node.config)


def stored_bytes(node: LocalNode) -> list[int]:
    return sorted(each.size_bytes for each in node.client.node().host_store.images)


def alter(path: Path, offset: int, count: int) -> None:
    """Overwrite bytes in place, and put back what times can be put back."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_weights_come_back_from_disk_unless_something_changed(
    tmp_path: Path, start_node: NodeMaker, oracle: Oracle
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "prose", repository / "prose")
    checkpoint = repository / "prose" / "1" / "model.safetensors"
    time.sleep(SETTLE_S)  # the file system's clock cannot be set
    expected = oracle.answer("prose", PROMPT, TOKENS)

    node = start_node(
        config={"image_cache": {"budget_bytes": CACHE_BYTES, "keep": "all"}},
        repository=repository,
        load=("prose",),
    )
    assert ask(node) == expected
    assert (loads(node, "checkpoint"), loads(node, "cache")) == (1, 0)
    kept = written(node, 1)

    with stopped(node) as node:  # with nothing in memory; what was ACTIVE is brought back
        assert ask(node) == expected
        assert (loads(node, "checkpoint"), loads(node, "cache")) == (0, 1)

    alter(kept[0], 5000, 16)
    with stopped(node) as node:
        assert ask(node) == expected
        assert (loads(node, "checkpoint"), loads(node, "cache")) == (1, 0)
        assert any("it was removed" in warning for warning in node.client.node().warnings)
        written(node, 1)

    # Other weights in the same file, of the same size and time: they must be what answers.
    alter(checkpoint, checkpoint.stat().st_size // 2, ALTERED_BYTES)
    with stopped(node) as node:
        assert ask(node) != expected
        assert (loads(node, "checkpoint"), loads(node, "cache")) == (1, 0)


def test_a_node_that_starts_with_another_dtype_makes_its_images_anew(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    expected = oracle.answer("prose", PROMPT, TOKENS)
    node = start_node(
        config={"image_cache": {"budget_bytes": CACHE_BYTES, "keep": "all"}}, load=("prose",)
    )
    written(node, 1)
    (wide,) = stored_bytes(node)

    # What serves goes on as it is under another daemon, and is made anew when it comes in again.
    node.kill()
    node.config["worker"]["dtype"] = "bfloat16"
    node.start()
    assert ask(node) == expected
    assert stored_bytes(node) == [wide]
    node.client.wait(node.client.unload("prose"))
    node.client.wait(node.client.load("prose"))
    assert (loads(node, "checkpoint"), loads(node, "cache")) == (1, 0)
    narrow = stored_bytes(node)[0]
    assert wide * 0.4 < narrow < wide * 0.6
    assert ask(node)
    written(node, 2)

    # With nothing in memory each is read back by its own dtype.
    for dtype, size_bytes in (("bfloat16", narrow), ("float32", wide)):
        node.config["worker"]["dtype"] = dtype
        with stopped(node) as node:
            answer = ask(node)
            assert answer == expected if dtype == "float32" else answer
            assert (loads(node, "checkpoint"), loads(node, "cache")) == (0, 1)
            assert stored_bytes(node) == [size_bytes]
