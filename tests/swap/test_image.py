"""Layouts and manifests: where tensors lie, and that a damaged manifest is never believed."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swap.errors import CorruptWeights
from swap.image import (
    LAYER_ALIGNMENT_BYTES,
    TENSOR_ALIGNMENT_BYTES,
    Manifest,
    TensorRecipe,
    complete,
    plan_image,
    read_manifest,
    segment_bytes,
)
from swap.image_check import verify_image
from swap.writing import write_all, write_manifest


def _zeros(layout: Manifest) -> dict[str, str]:
    return {entry.name: "ab" * 16 for entry in layout.tensors}


def _stored(manifest: Manifest, size_bytes: int) -> int:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, size_bytes)
    write_manifest(descriptor, manifest)
    return descriptor


shapes = st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple)
recipes = st.lists(st.tuples(st.integers(-1, 4), shapes), min_size=1, max_size=20).map(
    lambda items: [
        TensorRecipe(f"t{index}", layer, (f"s{index}",), shape)
        for index, (layer, shape) in enumerate(items)
    ]
)


@settings(max_examples=60, deadline=None)
@given(recipes, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_a_layout_is_aligned_ordered_and_without_overlaps(items, dtype):
    layout = plan_image(items, dtype)
    assert [span.layer for span in layout.layers] == sorted({item.layer for item in items})
    position = 0
    for span in layout.layers:
        assert span.offset_bytes == position
        assert span.offset_bytes % LAYER_ALIGNMENT_BYTES == 0
        inside = [entry for entry in layout.tensors if entry.layer == span.layer]
        end = span.offset_bytes
        for entry in inside:
            assert entry.offset_bytes % TENSOR_ALIGNMENT_BYTES == 0
            assert entry.offset_bytes >= end
            end = entry.offset_bytes + entry.size_bytes
        position += span.bytes
        assert end <= position < end + LAYER_ALIGNMENT_BYTES
    assert position == layout.weights_bytes
    assert {entry.name: entry.shape for entry in layout.tensors} == {
        item.name: item.shape for item in items
    }
    manifest = complete(layout, _zeros(layout))
    descriptor = _stored(manifest, segment_bytes(layout))
    try:
        assert read_manifest(descriptor) == manifest
    finally:
        os.close(descriptor)


def test_tensors_keep_their_order_within_a_layer():
    layout = plan_image(
        [
            TensorRecipe("b", 0, ("x",), (1,)),
            TensorRecipe("e", -1, ("x",), (1,)),
            TensorRecipe("a", 0, ("x",), (1,)),
        ],
        "float32",
    )
    assert [entry.name for entry in layout.tensors] == ["e", "b", "a"]


@pytest.mark.parametrize(
    ("names", "dtype"), [((), "float32"), (("a", "a"), "float32"), (("a",), "float64")]
)
def test_layouts_that_make_no_sense(names, dtype):
    with pytest.raises(ValueError, match=r"laid out|same name"):
        plan_image([TensorRecipe(name, 0, ("x",), (1,)) for name in names], dtype)


def test_the_digest_names_contents_and_model(make_image):
    digests = {make_image(seed)[0].digest for seed in range(3)}
    assert len(digests) == 3
    assert make_image(1)[0].digest in digests
    layout = plan_image([TensorRecipe("a", 0, ("x",), (1,))], "float32", {"9": 1, "10": (2, 3)})
    other = msgspec.structs.replace(layout, model={"9": 2, "10": [2, 3]})
    assert complete(layout, _zeros(layout)).digest != complete(other, _zeros(other)).digest
    assert layout.model == {"9": 1, "10": [2, 3]}


def test_a_manifest_that_lies_is_refused(make_image):
    """Altered, and then signed again with the right digest and checksum."""
    manifest, segment = make_image()
    first, second, *rest = manifest.tensors
    replace = msgspec.structs.replace
    lies = {
        "follow the one before": {"layers": manifest.layers[1:]},
        "its layers end": {"weights_bytes": manifest.weights_bytes + 4096},
        "lies outside": {"tensors": (first, replace(second, offset_bytes=0), *rest)},
        "lies outside its layer": {"tensors": (replace(first, shape=(10**6,)), second, *rest)},
        "no tensor has": {"tensors": (replace(first, dtype="int8"), second, *rest)},
        "shape or dtype": {"tensors": (replace(first, shape=(-1, -1)), second, *rest)},
        "same name": {"tensors": (replace(first, name=second.name), second, *rest)},
        "format 1, made by another release": {"format": 1},
    }
    for says, change in lies.items():
        altered = replace(manifest, **change)
        signed = complete(altered, {entry.name: entry.checksum for entry in altered.tensors})
        descriptor = _stored(signed, segment.size_bytes + 4096)
        with pytest.raises(CorruptWeights, match=says):
            read_manifest(descriptor)
        os.close(descriptor)
    descriptor = _stored(replace(manifest, digest="0" * 64), segment.size_bytes)
    with pytest.raises(CorruptWeights, match="digest"):
        read_manifest(descriptor)
    os.close(descriptor)


def test_any_damage_to_manifest_or_trailer_is_noticed(make_image):
    manifest, segment = make_image()
    content = bytearray(os.pread(segment.descriptor, segment.size_bytes, 0))
    choose = random.Random(2)
    used = manifest.weights_bytes + len(msgspec.json.encode(manifest))
    places = [*range(manifest.weights_bytes, used), *range(len(content) - 28, len(content) - 4)]
    for place in [*choose.sample(places, 200), *places[-24:]]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << choose.randrange(8)
        descriptor = os.memfd_create("damaged")
        write_all(descriptor, bytes(damaged), 0)
        try:
            with pytest.raises(CorruptWeights):
                read_manifest(descriptor)
        except pytest.fail.Exception:
            # Only the four bytes of padding inside the trailer mean nothing.
            assert place >= len(content) - 4
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("size", [0, 5, 4096, 10_000])
def test_a_cut_segment_is_refused(make_image, size):
    _, segment = make_image()
    descriptor = os.memfd_create("cut")
    write_all(descriptor, os.pread(segment.descriptor, size, 0), 0)
    with pytest.raises(CorruptWeights):
        read_manifest(descriptor)
    os.close(descriptor)


def test_verification_finds_the_tensor_that_was_altered(make_image):
    manifest, segment = make_image()
    content = bytearray(os.pread(segment.descriptor, segment.size_bytes, 0))
    verify_image(segment.descriptor, manifest)
    victim = manifest.tensors[2]
    content[victim.offset_bytes + victim.size_bytes - 1] ^= 0x10
    descriptor = os.memfd_create("altered")
    write_all(descriptor, bytes(content), 0)
    assert read_manifest(descriptor) == manifest
    verify_image(descriptor, manifest, ["t0", "t1", "t3"])
    with pytest.raises(CorruptWeights, match="tensor t2") as found:
        verify_image(descriptor, manifest)
    assert found.value.metadata == {"tensor": "t2", "digest": manifest.digest}
    os.ftruncate(descriptor, victim.offset_bytes + 1)
    with pytest.raises(CorruptWeights, match="ends within tensor t2"):
        verify_image(descriptor, manifest)
    os.close(descriptor)
