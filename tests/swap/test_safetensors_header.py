"""Headers, sound and unsound: never believed, and never an error of any other kind."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from swap.errors import CheckpointInvalid
from swap.safetensors_header import BITS_PER_ELEMENT, header_length, parse_header

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [34, 42]},
    "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [42, 42]},
}
DATA_BYTES = 42


def parse(header: Any, data_bytes: int = DATA_BYTES) -> Any:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(encoded, 8 + len(encoded) + data_bytes, "x.safetensors")


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_a_sound_header():
    tensors = parse(GOOD)
    assert [tensor.name for tensor in tensors] == list("abcd")
    start = 8 + len(json.dumps(GOOD).encode())
    assert [tensor.offset_bytes - start for tensor in tensors] == [0, 24, 34, 42]
    assert [tensor.size_bytes for tensor in tensors] == [24, 10, 8, 0]
    assert tensors[0].shape == (2, 3)
    assert parse({}, 0) == ()
    assert parse(b"{}   ", 0) == ()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a":', "JSON"),
        (b'{"a":1,"a":2}', "occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', "occurs twice"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", "JSON"),
        ({**GOOD, "__metadata__": {"format": 1}}, "map of texts"),
        ({**GOOD, "__metadata__": None}, "map of texts"),
        ({**GOOD, "a": None}, "has not dtype"),
        ({**GOOD, "a": {"dtype": "F32", "shape": [1]}}, "has not dtype"),
        (changed("a", extra=1), "has not dtype"),
        (changed("a", dtype="F128"), "unknown dtype"),
        (changed("a", dtype=["F32"]), "unknown dtype"),
        (changed("a", shape="23"), "has the shape"),
        (changed("a", shape=[2.0, 3]), "has the shape"),
        (changed("a", shape=[True, 6]), "has the shape"),
        (changed("a", shape=[-2, -3]), "has the shape"),
        (changed("a", shape=[1] * 17), "has the shape"),
        (changed("a", shape=[2**40, 2**40, 0]), "elements"),
        (changed("a", shape=[10**5000]), "JSON"),
        (changed("a", shape=[2, 4]), "does not take 24 bytes"),
        (changed("a", data_offsets=[0, 23]), "does not take 23 bytes"),
        (changed("a", data_offsets=[24, 0]), "has the offsets"),
        (changed("a", data_offsets=[0, 24, 24]), "has the offsets"),
        (changed("a", data_offsets=[-24, 0]), "has the offsets"),
        (changed("b", data_offsets=[20, 30]), "overlaps"),
        (changed("a", data_offsets=[18, 42]), "leaves a hole|overlaps"),
        (changed("b", data_offsets=[25, 35]), "leaves a hole"),
        (changed("c", data_offsets=[35, 43]), "leaves a hole"),
        ({**GOOD, "b2": GOOD["b"]}, "overlaps"),
        ({"a": GOOD["a"]}, "bytes behind its last tensor"),
        ({**GOOD, "e": {"dtype": "U8", "shape": [9], "data_offsets": [42, 51]}}, "was cut"),
    ],
)
def test_an_unsound_header_is_refused(header, says):
    if isinstance(header, dict) and header.get("a", {}) and says == "JSON":
        header = json.dumps(GOOD).replace("[2, 3]", "[" + "9" * 5000 + "]").encode()
    with pytest.raises(CheckpointInvalid, match=says) as refused:
        parse(header)
    assert refused.value.metadata["file"] == "x.safetensors"


def test_the_length_is_bounded_by_limit_and_file():
    assert header_length(struct.pack("<Q", 92), 100, "x") == 92
    for prefix, size, says in (
        (b"1234", 4, "too few"),
        (struct.pack("<Q", 93), 100, "was cut"),
        (struct.pack("<Q", 1 << 62), 1 << 63, "over the limit"),
    ):
        with pytest.raises(CheckpointInvalid, match=says):
            header_length(prefix, size, "x")


names = st.text(max_size=6)
numbers = st.integers(-2, 50) | st.integers(2**60, 2**66) | st.floats() | st.booleans()
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BITS_PER_ELEMENT, "F4", "f32", ""]) | st.none(),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | st.none(),
        "more": numbers,
    },
)
json_values = st.recursive(
    st.none() | numbers | names, lambda inner: st.lists(inner) | st.dictionaries(names, inner)
)


def _accepted_by_library(encoded: bytes, data_bytes: int) -> dict[str, Any] | None:
    content = struct.pack("<Q", len(encoded)) + encoded + bytes(data_bytes)
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None


def _agrees(encoded: bytes, data_bytes: int) -> None:
    """Whatever is accepted here the library accepts too, and means the same by it."""
    try:
        tensors = parse(encoded, data_bytes)
    except CheckpointInvalid:
        return
    found = _accepted_by_library(encoded, data_bytes)
    assert found is not None
    assert found.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert tuple(found[tensor.name]["shape"]) == tensor.shape
        assert found[tensor.name]["dtype"] == tensor.dtype
        assert len(found[tensor.name]["data"]) == tensor.size_bytes


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, entries, max_size=4), st.integers(0, 100))
def test_any_header_of_the_right_kind(header, data_bytes):
    _agrees(json.dumps(header).encode(), data_bytes)


@settings(max_examples=200, deadline=None)
@given(json_values, st.integers(0, 10))
def test_any_json(value, data_bytes):
    _agrees(json.dumps(value).encode(), data_bytes)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_bytes_changed_in_a_sound_header(data):
    encoded = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] = data.draw(st.integers(0, 255))
    _agrees(bytes(encoded), DATA_BYTES)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "F16", "U8"]), st.lists(st.integers(0, 4), max_size=6)),
        max_size=5,
    )
)
def test_every_sound_header_is_accepted(items):
    header, position = {}, 0
    for index, (dtype, shape) in enumerate(items):
        size = BITS_PER_ELEMENT[dtype] // 8
        for dimension in shape:
            size *= dimension
        header[f"t{index}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    assert len(parse(header, position)) == len(items)
