"""Checkpoints damaged in every way, before a real image builder: refused by name, or built right.

The examples are the same in every run. Whatever the files hold, the builder answers with a reason
of its own tree that names a file, tensor or field, goes on serving requests, and takes little
memory; and what it builds is what the safetensors library reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine.link.build import Build, Built, Failed, Inspect, Inspected
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec
from swap.image import read_manifest
from swap.segment import Segment
from tests.engine.test_builder import CONFIG, Session, builder, source_shapes

EXAMPLES = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REASONS = ("CHECKPOINT_INVALID", "ARCH_UNSUPPORTED")
GROWTH_BYTES_MAX = 64 << 20
JUNK_BYTES = 16 << 20
JUNK_GROWTH_BYTES_MAX = 1 << 30

Spoil = Callable[[st.DataObject, Path], None]

EXTREMES = (0, 1, -1, 7, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 10**30, 10**400)
OTHERS = (None, True, "x", "", [], [1], {}, 1.5, 1e308, float("nan"), float("-inf"), "9" * 5000)
numbers = st.sampled_from(EXTREMES)
values = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.lists(numbers, max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), numbers, max_size=2),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 checkpoint of random float32 weights."""
    directory = tmp_path_factory.mktemp("sound")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    spec = ModelSpec.from_directory(directory)
    generator = np.random.default_rng(5)
    tensors = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in source_shapes(spec).items()
    }
    save_file(tensors, directory / FILE)
    return directory


# Ways to spoil one.


def spoil_configuration(data: st.DataObject, directory: Path) -> None:
    more = ("head_dim", "eos_token_id", "rope_parameters", "rope_scaling", "rope_theta", "dtype")
    config: dict[str, Any] = dict(CONFIG)
    for name in data.draw(st.sets(st.sampled_from([*CONFIG, *more]), min_size=1, max_size=2)):
        config[name] = data.draw(values)
    name = data.draw(st.sampled_from(["config.json", "generation_config.json"]))
    (directory / name).write_text(json.dumps(config))


def spoil_bytes(data: st.DataObject, directory: Path) -> None:
    name = data.draw(st.sampled_from(["config.json", FILE]))
    content = bytearray((directory / name).read_bytes())
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0] if name == FILE else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header_bytes - 1))
        content[place] = data.draw(st.integers(0, 255))
    (directory / name).write_bytes(content)


def spoil_length(data: st.DataObject, directory: Path) -> None:
    content = (directory / FILE).read_bytes()
    if data.draw(st.booleans()):
        keep = data.draw(st.integers(0, len(content)) | st.integers(0, 16))
        content = content[:keep] + bytes(data.draw(st.sampled_from([0, 0, 1, 5000])))
    else:
        length = data.draw(st.sampled_from([0, 1, 1 << 24, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
        content = struct.pack("<Q", length) + content[8:]
    (directory / FILE).write_bytes(content)


def spoil_header(data: st.DataObject, directory: Path) -> None:
    content = (directory / FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 2))):
        name, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        entry = header.get(name)
        kind = data.draw(st.sampled_from(["offsets", "dtype", "shape", "exchange", "drop", "any"]))
        if entry is None or kind == "drop":
            header.pop(name, None)
        elif kind == "offsets":
            entry["data_offsets"] = [data.draw(numbers), data.draw(numbers)]
        elif kind == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(["F64", "BF16", "I32", "F4", ""]))
        elif kind == "shape":
            entry["shape"] = data.draw(st.lists(numbers, max_size=3))
        elif kind == "exchange" and other in header:
            header[name], header[other] = header[other], header[name]
        else:
            header[name] = data.draw(values)
    encoded = json.dumps(header).encode()
    if data.draw(st.integers(0, 9)) == 0:  # a name twice, as no dict can say
        encoded = encoded[:-1] + b"," + encoded[1:]
    body = content[8 + length :]
    (directory / FILE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def spoil_index(data: st.DataObject, directory: Path) -> None:
    names = list(load_file(directory / FILE))
    (directory / FILE).rename(directory / "one.safetensors")
    shards = st.sampled_from(
        [
            *("one.safetensors", "missing.safetensors", "../sound/model.safetensors"),
            *("/etc/passwd", "config.json", "a/b.safetensors", "..", "\0.safetensors", ""),
        ]
    )
    placed: dict[str, Any] = dict.fromkeys(names, "one.safetensors")
    for name in data.draw(st.sets(st.sampled_from([*names, "no.such.tensor"]), max_size=2)):
        placed[name] = data.draw(shards | values)
    index: Any = {"weight_map": placed} if data.draw(st.integers(0, 5)) else data.draw(values)
    encoded = json.dumps(index).encode()
    kind = data.draw(st.integers(0, 9))
    if kind == 0:
        encoded = b"[" * 200_000
    elif kind == 1:
        encoded = encoded.replace(b"w", b"\xff")
    elif kind == 2:
        encoded = encoded[: len(encoded) // 2]
    (directory / INDEX).write_bytes(encoded)


SPOILS: tuple[Spoil, ...] = (
    spoil_configuration,
    spoil_bytes,
    spoil_length,
    spoil_header,
    spoil_index,
)


# What must hold.


def grown_bytes(session: Session) -> int:
    """The most memory the process has had."""
    status = Path(f"/proc/{session.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def named(reply: Failed, directory: Path) -> bool:
    """Whether a refusal says where: a file, a tensor or a field."""
    if not {"file", "tensor", "field", "architecture"}.isdisjoint(reply.metadata):
        return True
    return any(path.name in reply.message for path in directory.iterdir()) or INDEX in reply.message


def same_weights(segment: Segment, directory: Path) -> None:
    """The image holds, fused, what the safetensors library reads from the same files."""
    tensors: dict[str, Any] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    recipes = {each.name: each for each in image_recipes(ModelSpec.from_directory(directory))}
    for entry in read_manifest(segment.descriptor).tensors:
        parts = [tensors[name].astype(np.float32) for name in recipes[entry.name].sources]
        held = os.pread(segment.descriptor, entry.size_bytes, entry.offset_bytes)
        assert held == np.concatenate(parts).tobytes(), entry.name


async def answered(session: Session, directory: Path) -> str:
    """Inspect and, if that succeeds, build. What the builder made of it."""
    told = await session.call(Inspect(str(directory)))
    if isinstance(told, Inspected):
        assert told.segment_bytes < 64 << 20
        with Segment.create(told.segment_bytes, "fuzzed") as segment:
            told = await session.call(Build(), segment.descriptor)
            if isinstance(told, Built):
                same_weights(segment, directory)
                return "built"
    assert isinstance(told, Failed)
    assert told.reason in REASONS, told
    assert named(told, directory), told
    return told.reason


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_any_damage_is_refused_by_name_or_builds_what_is_there(
    sound: Path, tmp_path: Path, spoil: Spoil
) -> None:
    verdicts: dict[str, int] = {}
    with asyncio.Runner() as runner:
        context = builder()
        session = runner.run(context.__aenter__())
        try:
            assert runner.run(answered(session, sound)) == "built"
            before = grown_bytes(session)

            @EXAMPLES
            @given(st.data())
            def examples(data: st.DataObject) -> None:
                directory = tmp_path / "model"
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(sound, directory)
                spoil(data, directory)
                verdict = runner.run(answered(session, directory))
                verdicts[verdict] = verdicts.get(verdict, 0) + 1

            examples()
            assert grown_bytes(session) - before < GROWTH_BYTES_MAX
            assert runner.run(answered(session, sound)) == "built"  # it is as it was
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert verdicts["CHECKPOINT_INVALID"] > 10, verdicts


def test_every_field_at_its_extremes(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sound, directory)
    more = ("head_dim", "eos_token_id", "rope_theta", "sliding_window", "partial_rotary_factor")
    built = set()

    async def main() -> None:
        async with builder() as session:
            for name in (*CONFIG, *more):
                for value in (*EXTREMES, *OTHERS):
                    content = json.dumps({**CONFIG, name: value})
                    (directory / "config.json").write_text(content)
                    if await answered(session, directory) == "built":
                        built.add(name)

    asyncio.run(main())
    assert "max_position_embeddings" in built
    assert "num_hidden_layers" not in built  # fewer than there are would be another model


@pytest.mark.parametrize(
    "junk",
    [b'{"a":[' + b"[]," * (JUNK_BYTES // 3), b"[" * JUNK_BYTES, b'{"a":{' + b'"":0,' * 3_000_000],
    ids=["lists", "deep", "names"],
)
@pytest.mark.parametrize("place", [FILE, INDEX])
def test_much_junk_takes_little_memory(
    sound: Path, tmp_path: Path, junk: bytes, place: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sound, directory)
    if place == FILE:
        junk = junk[: JUNK_BYTES - 8]
        junk = struct.pack("<Q", len(junk)) + junk
    else:
        (directory / FILE).unlink()
    (directory / place).write_bytes(junk)

    async def main() -> None:
        async with builder() as session:
            assert await answered(session, directory) == "CHECKPOINT_INVALID"
            assert grown_bytes(session) < JUNK_GROWTH_BYTES_MAX

    asyncio.run(main())


def test_weights_that_are_no_numbers_arrive_as_they_are(sound: Path, tmp_path: Path) -> None:
    """A checkpoint's values are its maker's: NaN and infinity are neither refused nor changed."""
    directory = tmp_path / "model"
    shutil.copytree(sound, directory)
    tensors = load_file(directory / FILE)
    tensors["model.norm.weight"][:3] = (np.nan, np.inf, -np.inf)
    save_file(tensors, directory / FILE)

    async def main() -> None:
        async with builder() as session:
            assert await answered(session, directory) == "built"

    asyncio.run(main())
