"""Images damaged in every way: refused with a reason that says which, or the same to the byte.

The examples are the same in every run. Damage to a file on disk meets the reader that hotbayd uses;
manifests that lie are signed as a sound one would be, so that only what they say gives them away.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from swap.build import build_image
from swap.cached_image import restore_image, save_image
from swap.checkpoint import Checkpoint
from swap.errors import CorruptWeights, SwapError
from swap.image import (
    _TRAILER,
    Manifest,
    TensorRecipe,
    _digest_of,
    plan_image,
    read_manifest,
    segment_bytes,
)
from swap.image_check import verify_image
from swap.segment import Segment
from swap.store import HostStore
from swap.writing import write_all
from tests.support.descriptors import open_descriptors

SHAPES = {"embedding": (-1, (96, 64)), "a": (0, (70, 100)), "norm": (0, (33,)), "b": (1, (9000,))}
RECIPES = [TensorRecipe(name, layer, (name,), shape) for name, (layer, shape) in SHAPES.items()]
PIECE_WEIGHTS = 4096
GROWTH_BYTES_MAX = 256 << 20


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


@dataclass(frozen=True)
class Kept:
    """A sound image in a file, its plan, and what a segment holds that was read from it."""

    layout: Manifest
    manifest: Manifest
    path: Path
    content: bytes
    restored: bytes


def content_of(segment: Segment) -> bytes:
    return os.pread(segment.descriptor, os.fstat(segment.descriptor).st_size, 0)


@pytest.fixture(scope="module", params=["plain", "packed"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    directory = tmp_path_factory.mktemp(request.param)
    generator = np.random.default_rng(3)
    tensors = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, (_, shape) in SHAPES.items()
    }
    save_file(tensors, directory / "model.safetensors")
    packed = request.param == "packed"
    layout = plan_image(
        RECIPES,
        "bfloat16" if packed else "float32",
        {"hidden": 64},
        piece_weights=PIECE_WEIGHTS if packed else 0,
    )
    path = directory / "an.image"
    with Checkpoint.open(directory) as checkpoint:
        with Segment.create(segment_bytes(layout), "sound") as segment:
            manifest = build_image(checkpoint, RECIPES, layout, segment)
            save_image(segment, path)
        with Segment.create(segment_bytes(layout), "restored") as segment:
            restore_image(path, layout, segment)
            restored = content_of(segment)
    return Kept(layout, manifest, path, path.read_bytes(), restored)


@dataclass(frozen=True)
class Damage:
    """What is done to a file's bytes; `place` counts from the start, or for `end` from the end."""

    kind: str
    place: int
    bit: int

    def apply(self, content: bytes) -> bytes:
        damaged, place = bytearray(content), self.place % len(content)
        if self.kind == "flip":
            damaged[place] ^= 1 << self.bit
        elif self.kind == "end":  # manifest and trailer, which are a small part of the whole
            damaged[-1 - place % 4096] ^= 1 << self.bit
        elif self.kind == "cut":
            del damaged[place:]
        elif self.kind == "grow":
            damaged += bytes(1 << self.bit * 2)
        elif self.kind == "zeros":
            damaged[place : place + 4096] = bytes(len(damaged[place : place + 4096]))
        else:
            page = place // 4096 * 4096
            head, other = damaged[:4096], damaged[page : page + 4096]
            damaged[page : page + 4096], damaged[:4096] = head, other
        return bytes(damaged)


damages = st.builds(
    Damage,
    st.sampled_from(["flip", "flip", "flip", "end", "cut", "grow", "zeros", "exchange"]),
    st.integers(0, 1 << 20),
    st.integers(0, 7),
)


def refusal(kept: Kept, path: Path, segment: Segment) -> SwapError | None:
    """Why a file cannot be read back into the segment; None when it was."""
    try:
        restore_image(path, kept.layout, segment, digest=kept.manifest.digest)
    except SwapError as error:
        return error
    return None


def test_a_damaged_file_is_refused_by_name_or_gives_the_same_image(
    kept: Kept, tmp_path: Path
) -> None:
    refused = 0

    @bounded(200)
    @given(damages)
    def examples(damage: Damage) -> None:
        nonlocal refused
        path = tmp_path / "damaged.image"
        path.write_bytes(damage.apply(kept.content))
        with Segment.create(segment_bytes(kept.layout), "back") as segment:
            error = refusal(kept, path, segment)
            if error is not None:
                assert error.reason in ("CORRUPT_WEIGHTS", "IMAGE_CACHE_FAILED"), error
                assert path.name in str(error), error
                assert not segment.sealed
                refused += 1
                return
            assert segment.sealed
            assert read_manifest(segment.descriptor) == kept.manifest
            # Of a packed image some bits mean nothing; its weights are what counts.
            verify_image(segment.descriptor, kept.manifest)
            same = content_of(segment) == kept.restored
            assert same or kept.manifest.packed

    descriptors = len(open_descriptors())
    examples()
    assert refused > 50
    assert len(open_descriptors()) == descriptors


# Manifests that lie.


extremes = st.sampled_from([-1, 0, 1, 255, 256, 4096, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 64])
lies = st.one_of(
    extremes,
    st.none(),
    st.text(max_size=4),
    st.lists(extremes, max_size=3),
    st.just([1 << 62] * 40),
)


def signed(fields: dict[str, object]) -> bytes:
    """The manifest as bytes, with the digest it should have, if it can be read at all."""
    encoded = json.dumps(fields).encode()
    try:
        manifest = msgspec.json.decode(encoded, type=Manifest)
    except (msgspec.MsgspecError, RecursionError):
        return encoded
    return msgspec.json.encode(msgspec.structs.replace(manifest, digest=_digest_of(manifest)))


@st.composite
def lying(draw: st.DrawFn, manifest: Manifest) -> bytes:
    fields = json.loads(msgspec.json.encode(manifest))
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(["whole", "tensors", "layers"]))
        target = fields if where == "whole" else draw(st.sampled_from(fields[where] or [fields]))
        target[draw(st.sampled_from(sorted(target)))] = draw(lies)
        if not isinstance(fields.get("tensors"), list) or not isinstance(fields["layers"], list):
            break
        if not all(isinstance(each, dict) for each in (*fields["tensors"], *fields["layers"])):
            break
    return signed(fields)


def stored(content: bytes, encoded: bytes, offset: int) -> int:
    """A sealed segment of the weights, this manifest and a trailer that fits it."""
    segment = Segment.create(max(len(content), offset + len(encoded) + 4096), "lying")
    write_all(segment.descriptor, content[:offset], 0)
    write_all(segment.descriptor, encoded, offset)
    trailer = _TRAILER.pack(b"HOTBAYIM", offset, len(encoded), zlib.crc32(encoded))
    write_all(segment.descriptor, trailer, segment.size_bytes - len(trailer))
    segment.seal()
    return segment.descriptor


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_a_manifest_that_lies_is_refused_or_is_consistent(kept: Kept) -> None:
    refused, before = 0, peak_bytes()

    @bounded(300)
    @given(lying(kept.manifest))
    def examples(encoded: bytes) -> None:
        nonlocal refused
        descriptor = stored(kept.content, encoded, kept.manifest.stored_bytes)
        try:
            manifest = read_manifest(descriptor)
            assert manifest.stored_bytes == kept.manifest.stored_bytes
            for entry in manifest.tensors:
                assert entry.offset_bytes >= 0
                assert entry.offset_bytes + entry.size_bytes <= manifest.weights_bytes
            verify_image(descriptor, manifest)
        except CorruptWeights:
            refused += 1
        finally:
            os.close(descriptor)

    examples()
    assert refused > 100
    assert peak_bytes() - before < GROWTH_BYTES_MAX


@pytest.fixture
def store() -> Iterator[HostStore]:
    opened = HostStore(64 << 20)
    yield opened
    opened.close()


def test_a_store_takes_in_no_damaged_image_and_keeps_no_descriptor(
    kept: Kept, store: HostStore
) -> None:
    with Segment.create(len(kept.content), "sound") as segment:
        write_all(segment.descriptor, kept.content, 0)
        segment.seal()
        store.adopt(os.dup(segment.descriptor))
    used, descriptors = store.used_bytes, len(open_descriptors())

    @bounded(60)
    @given(damages)
    def examples(damage: Damage) -> None:
        content = damage.apply(kept.content)
        segment = Segment.create(len(content), "damaged")
        write_all(segment.descriptor, content, 0)
        segment.seal()
        with contextlib.suppress(CorruptWeights):
            # What is the same to its manifest is the same image: one copy is kept.
            assert store.adopt(segment.descriptor).digest == kept.manifest.digest
        assert store.used_bytes == used

    examples()
    assert len(open_descriptors()) == descriptors
