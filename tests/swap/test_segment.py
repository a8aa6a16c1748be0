"""Segments: sealed memory, its descriptors and its mappings."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from pathlib import Path

import pytest

from swap.errors import CorruptWeights, DeviceError
from swap.segment import Segment
from swap.writing import write_all
from tests.support.descriptors import open_descriptors


def test_a_sealed_segment_cannot_be_changed_by_anybody(make_image):
    _, segment = make_image()
    other = os.dup(segment.descriptor)
    with pytest.raises(PermissionError):
        os.pwrite(other, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(other, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(other, segment.size_bytes * 2)
    with pytest.raises(PermissionError):
        mmap.mmap(other, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(other, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    segment.seal()
    assert segment.sealed
    os.close(other)


def test_a_mapping_outlives_descriptor_and_name():
    segment = Segment.create(10_000, "one")
    assert os.readlink(f"/proc/self/fd/{segment.descriptor}").startswith("/memfd:hotbay-image:one")
    write_all(segment.descriptor, b"weights", 4000)
    segment.seal()
    mapping = segment.map()
    segment.close()
    segment.close()
    assert segment.closed
    assert bytes(mapping.view(4000, 7)) == b"weights"
    assert len(mapping.view()) == 10_000
    with pytest.raises(TypeError):
        mapping.view()[0] = 1
    for offset, size in ((9_999, 2), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="not mapped"):
            mapping.view(offset, size)
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="not mapped"):
        mapping.view(0, 1)


def test_descriptors_and_mappings_are_given_back():
    before = open_descriptors()
    for _ in range(50):
        with Segment.create(1 << 20, "x" * 400) as segment, segment.map() as mapping:
            assert mapping.view(1 << 19, 1)[0] == 0
    assert open_descriptors() <= before
    assert "hotbay-image" not in Path("/proc/self/maps").read_text()


def test_only_sealed_segments_are_adopted(tmp_path, make_image):
    manifest, segment = make_image()
    adopted = Segment.adopt(os.dup(segment.descriptor))
    assert adopted.size_bytes == segment.size_bytes
    adopted.close()
    before = open_descriptors()
    unsealed = Segment.create(4096, "unfinished")
    with pytest.raises(CorruptWeights, match="not sealed"):
        Segment.adopt(unsealed.descriptor)
    ordinary = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(CorruptWeights, match="not sealed"):
        Segment.adopt(ordinary)
    reading, writing = os.pipe()
    with pytest.raises(CorruptWeights, match="no memory file"):
        Segment.adopt(reading)
    os.close(writing)
    with pytest.raises(CorruptWeights):
        Segment.adopt(-1)
    assert open_descriptors() <= before
    assert manifest.weights_bytes < segment.size_bytes


def test_the_system_may_refuse_a_size():
    before = open_descriptors()
    with pytest.raises(DeviceError, match="cannot be made"):
        Segment.create(-1, "less than nothing")
    assert open_descriptors() <= before
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(DeviceError, match=r"cannot be created: .*open files"):
            Segment.create(4096, "one too many")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
