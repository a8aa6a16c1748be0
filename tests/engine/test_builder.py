"""The image builder as hotbayd meets it: a real process behind a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.link.build import (
    PACKED_DTYPE,
    Build,
    BuildProgress,
    Built,
    Failed,
    FromBuilder,
    Inspect,
    Inspected,
    Restored,
    Saved,
    Touched,
)
from engine.link.errors import LinkError
from engine.link.peer import Peer
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec
from swap.image_check import verify_image
from swap.pieces import device_bytes
from swap.segment import Segment
from swap.store import HostStore

ROOT = Path(__file__).parents[2]
CALL_S = 120.0
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def source_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of this shape holds, by its own names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for recipe in image_recipes(spec):
        rows = {recipe.sources[0]: recipe.shape[0]}
        if len(recipe.sources) == 3:
            key_value = spec.kv_heads * spec.head_dim
            rows = dict(
                zip(
                    recipe.sources,
                    (recipe.shape[0] - 2 * key_value, key_value, key_value),
                    strict=True,
                )
            )
        elif len(recipe.sources) == 2:
            rows = dict.fromkeys(recipe.sources, recipe.shape[0] // 2)
        shapes |= {name: (count, *recipe.shape[1:]) for name, count in rows.items()}
    return shapes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Qwen2 checkpoint (with biases, untied) of random float32 weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    numbers = np.random.default_rng(5)
    tensors = {
        name: numbers.standard_normal(shape).astype(np.float32)
        for name, shape in source_shapes(ModelSpec.from_directory(directory)).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


class Session:
    """A running builder and this end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self.process = process
        self.progress: list[BuildProgress] = []
        self.told = asyncio.Event()
        self.peer: Peer[Any] = Peer(
            ours,
            FromBuilder,
            name="builder",
            replies=(Inspected, Built, Restored, Saved, Touched, Failed),
            handler=self._take,
            on_close=self._closed,
        )

    async def _take(self, message: Any, descriptors: list[int]) -> None:
        assert isinstance(message, BuildProgress)
        self.progress.append(message)
        self.told.set()

    def _closed(self, error: LinkError) -> None:
        self.told.set()

    async def call(self, message: Any, *descriptors: int) -> Any:
        reply, received = await self.peer.call(message, descriptors, timeout_s=CALL_S)
        assert received == []
        return reply

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait, CALL_S)


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "engine.builder", "--descriptor", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
    )


@contextlib.asynccontextmanager
async def builder() -> AsyncIterator[Session]:
    ours, theirs = socket.socketpair()
    process = _start(theirs)
    theirs.close()
    session = Session(process, ours)
    try:
        yield session
    finally:
        await session.peer.close()
        try:
            assert await session.wait() == 0
        finally:
            process.kill()
            process.wait()


def run(scenario: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        async with builder() as session:
            await scenario(session)

    asyncio.run(main())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", PACKED_DTYPE])
def test_a_checkpoint_becomes_an_image(model: Path, dtype: str) -> None:
    spec = ModelSpec.from_directory(model)
    store = HostStore(1 << 30)

    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(model), dtype))
        assert isinstance(inspected, Inspected)
        assert inspected.family == "qwen2"
        assert (inspected.layers, inspected.vocabulary, inspected.context_tokens) == (2, 64, 256)
        assert inspected.parameters == spec.parameters
        assert inspected.checkpoint_bytes == (model / "model.safetensors").stat().st_size
        plain = dtype.removesuffix("-packed")
        assert inspected.kv_bytes_per_token == spec.kv_bytes_per_token(plain)
        elements = 2 * spec.layers * spec.kv_heads * spec.head_dim
        assert inspected.kv_fp8_bytes_per_token == elements, "a byte each"
        assert inspected.kv_window_tokens == 0
        reservation = store.reserve(inspected.segment_bytes)
        segment = Segment.create(inspected.segment_bytes, "test")
        built = await session.call(Build(), segment.descriptor)
        assert isinstance(built, Built), built
        manifest = store.commit(reservation, segment)
        assert manifest.digest == built.digest
        assert manifest.packed == (dtype == PACKED_DTYPE)
        if manifest.packed:
            assert device_bytes(manifest) <= inspected.weights_bytes
            assert store.used_bytes <= inspected.segment_bytes
        else:
            assert manifest.weights_bytes == inspected.weights_bytes
        assert session.progress[-1].bytes_done == session.progress[-1].bytes_total

    run(scenario)
    manifest = store.manifest(store.images()[0].digest)
    assert ModelSpec.from_dict(manifest.model) == spec
    verify_image(store.descriptor(manifest.digest), manifest)
    if dtype == "float32":
        weights = load_file(model / "model.safetensors")
        for recipe, entry in zip(image_recipes(spec), manifest.tensors, strict=True):
            expected = np.concatenate([weights[name] for name in recipe.sources]).tobytes()
            stored = os.pread(
                store.descriptor(manifest.digest), entry.size_bytes, entry.offset_bytes
            )
            assert (entry.name, stored) == (recipe.name, expected)
    store.close()


def _without(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors")

    return change


def _transposed(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        save_file(tensors, directory / "model.safetensors")

    return change


def _configured(**fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps({**CONFIG, **fields}))

    return change


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason", "metadata"),
    [
        (_without(NORM), "CHECKPOINT_INVALID", {"tensor": NORM, "found": "nothing"}),
        (
            _transposed(DOWN),
            "CHECKPOINT_INVALID",
            {"tensor": DOWN, "expected": "[32, 48]", "found": "[48, 32]"},
        ),
        (_configured(vocab_size=65), "CHECKPOINT_INVALID", {"found": "[64, 32]"}),
        (_cut, "CHECKPOINT_INVALID", {"file": "model.safetensors"}),
        (_configured(architectures=["GPT2LMHeadModel"]), "ARCH_UNSUPPORTED", {}),
        (_configured(hidden_size=None), "CHECKPOINT_INVALID", {"field": "hidden_size"}),
        (lambda d: (d / "config.json").unlink(), "CHECKPOINT_INVALID", {"file": "config.json"}),
        (lambda d: (d / "model.safetensors").unlink(), "CHECKPOINT_INVALID", {}),
        (lambda d: shutil.rmtree(d), "CHECKPOINT_INVALID", {}),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    model: Path, tmp_path: Path, change: Any, reason: str, metadata: dict[str, str]
) -> None:
    good = tmp_path / "good"
    shutil.copytree(model, good)
    change(model)

    async def scenario(session: Session) -> None:
        failed = await session.call(Inspect(str(model)))
        assert isinstance(failed, Failed)
        assert failed.reason == reason
        assert metadata.items() <= failed.metadata.items()
        assert len(failed.message) > 20
        # The next request is served as if nothing had happened.
        assert isinstance(await session.call(Inspect(str(good))), Inspected)

    run(scenario)


def test_requests_out_of_order_are_refused(model: Path) -> None:
    async def scenario(session: Session) -> None:
        with Segment.create(4096, "small") as small:
            replies = [await session.call(Build(), small.descriptor)]
            replies.append(await session.call(Inspect(str(model), "int8")))
            inspected = await session.call(Inspect(str(model)))
            before = session.open_files()
            replies.append(await session.call(Build()))
            replies.append(await session.call(Build(), small.descriptor, small.descriptor))
            replies.append(await session.call(Build(), small.descriptor))
        assert [reply.reason for reply in replies] == ["BUILD_REFUSED"] * len(replies)
        assert session.open_files() == before
        with Segment.create(inspected.segment_bytes, "right") as right:
            assert isinstance(await session.call(Build(), right.descriptor), Built)
            again = await session.call(Build(), right.descriptor)
            assert again.reason == "BUILD_REFUSED"  # it is sealed now
        assert session.open_files() == before

    run(scenario)


def test_a_checkpoint_cut_after_inspection_fails_the_build(model: Path) -> None:
    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(model)))
        os.truncate(model / "model.safetensors", 4000)
        with Segment.create(inspected.segment_bytes, "test") as segment:
            failed = await session.call(Build(), segment.descriptor)
            assert failed.reason == "CHECKPOINT_INVALID"
            assert not segment.sealed

    run(scenario)


def hollow_checkpoint(model: Path) -> None:
    """An embedding of 512 MiB, all of it a hole in the file, so that everything takes a while."""
    (model / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 1 << 22}))
    spec = ModelSpec.from_directory(model)
    header, position = {}, 0
    for name, shape in source_shapes(spec).items():
        size = int(np.prod(shape)) * 4
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header).encode()
    with open(model / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + position)


def test_it_ends_when_hotbayd_goes_away_in_the_middle_of_a_build(model: Path) -> None:
    hollow_checkpoint(model)

    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(model), "bfloat16"))
        with Segment.create(inspected.segment_bytes, "test") as segment:
            building = asyncio.create_task(session.call(Build(), segment.descriptor))
            await asyncio.wait_for(session.told.wait(), CALL_S)
            await session.peer.close()
            with pytest.raises(LinkError):
                await building
            assert await session.wait() == 0
            assert not segment.sealed

    run(scenario)


def test_it_ends_at_nonsense() -> None:
    async def scenario(session: Session) -> None:
        session.peer.post(Failed(0, "X", "not what a builder takes"))
        assert await session.wait() == 0

    run(scenario)


def test_it_never_loads_torch() -> None:
    code = "import engine.builder, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
