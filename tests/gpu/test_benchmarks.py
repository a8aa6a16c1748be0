"""The benchmarks of a GPU, as far as they go without one."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import packed, preserve, staged_cuda, swap
from bench.device_costs import SMALL, main
from bench.peers import Peers
from bench.shapes import (
    GPU_SHAPES,
    HOST_SHAPES,
    TINY,
    fp8_layout,
    gpu_shape,
    host_shape,
    large_model,
    same_image,
)
from bench.swap_cuda import pinned_rate
from bench.worker import decoder, encoded
from engine.models.layout import image_recipes
from swap.cuda_device import CudaDevice
from swap.fake_driver import FakeDriver
from swap.image import plan_image, segment_bytes
from swap.image_check import verify_image
from swap.segment import Segment
from tests.support.descriptors import open_descriptors


def test_device_costs_measures_everything_and_gives_all_back(tmp_path: Path) -> None:
    output = tmp_path / "costs.json"
    assert main(["--fake", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["measurements"]
    assert set(found["handle_seconds"]) == {str(size) for size in SMALL.handles}
    kinds = {"pageable, host to device", "pinned, host to device", "pinned, device to host"}
    assert set(found["copy_bytes_per_s"]) == kinds
    assert set(found["registration_bytes_per_s"]) == {str(size) for size in SMALL.chunks}
    assert all(rate > 0 for rates in found["copy_bytes_per_s"].values() for rate in rates.values())


def test_the_links_rate_is_that_of_pinned_copies_and_the_device_is_closed() -> None:
    driver = FakeDriver()
    rate = pinned_rate(CudaDevice(16 << 20, page_bytes=2 << 20, driver=driver))
    assert rate > 0
    assert driver.calls["cuMemHostRegister"] == driver.calls["cuMemHostUnregister"] == 1
    assert set(driver.holdings().values()) == {0}
    driver.close()


def dry_run(model: str, output: Path, rounds: int) -> dict[str, Any]:
    arguments = ["--device", "cuda", "--fake", "--model", model, "--rounds", str(rounds)]
    assert swap.main([*arguments, "--output", str(output)]) == 0
    return dict(json.loads(output.read_text()))


@pytest.mark.parametrize(("model", "images"), [("8B", 2), ("30B", 1)])
def test_a_dry_run_swaps_over_a_fake_driver_beside_the_other_ways(
    model: str, images: int, tmp_path: Path
) -> None:
    result = dry_run(model, tmp_path / "swap.json", 4)
    assert result["parameters"]["images"] == images
    found = result["measurements"]
    assert len(found["first_token_s"]) == 4
    weights_bytes = result["parameters"]["weights_bytes"]
    assert {one["copied_bytes"] for one in found["ledgers"]} == {weights_bytes}
    assert {one["evicted_bytes"] for one in found["ledgers"]} == {weights_bytes}
    assert found["peers_error"] == ""
    assert [len(taken) for taken in found["peers"].values()] == ([3] * 4 if images == 2 else [])
    assert all(figure["met"] is None for figure in result["figures"])


def test_a_dry_run_of_a_transfer_copies_the_image_every_time(tmp_path: Path) -> None:
    result = dry_run("8B-fp8", tmp_path / "transfer.json", 3)
    found = result["measurements"]
    assert [len(found[name]) for name in ("rates", "map_s", "copy_s", "unmap_s")] == [3] * 4
    layout = fp8_layout(decoder(*TINY))
    assert result["parameters"]["weights_bytes"] == layout.weights_bytes


def test_a_dry_run_swaps_between_a_plain_and_a_packed_image(tmp_path: Path) -> None:
    output = tmp_path / "packed.json"
    arguments = ["--device", "cuda", "--fake", "--rounds", "2", "--output", str(output)]
    assert packed.main(arguments) == 0
    result = json.loads(output.read_text())
    found, sizes = result["measurements"], result["parameters"]
    assert sizes["stored_bytes"] < 0.75 * sizes["weights_bytes"]
    for kind, copied in (("plain", "weights_bytes"), ("packed", "stored_bytes")):
        assert len(found["first_token_s"][kind]) == 2
        assert {one["copied_bytes"] for one in found["ledgers"][kind]} == {sizes[copied]}
    assert all(figure["met"] is None for figure in result["figures"])


def test_a_dry_run_preserves_requests_with_and_without_room_for_their_kv(tmp_path: Path) -> None:
    output = tmp_path / "preserve.json"
    arguments = ["--device", "cuda", "--fake", "--rounds", "1", "--output", str(output)]
    assert preserve.main(arguments) == 0
    stays, parked = json.loads(output.read_text())["measurements"].values()
    assert stays["preserved"] == parked["preserved"] == [4]
    assert stays["parked_bytes"] == [0]
    assert parked["parked_bytes"][0] > 0
    assert len(stays["plain_s"]) == len(parked["away_s"]) == 1


def test_a_dry_run_swaps_to_staged_models_without_copying(tmp_path: Path) -> None:
    output = tmp_path / "staged.json"
    assert staged_cuda.main(["--fake", "--rounds", "3", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["measurements"]
    assert len(found["ready_s"]) == len(found["first_token_s"]) == 3
    assert all(a < b for a, b in zip(found["ready_s"], found["first_token_s"], strict=True))


def test_requests_to_preserve_have_the_lengths_and_the_room_that_are_asked_for() -> None:
    gpu = preserve.Scale.of("cuda", fake=False)
    assert gpu.lengths() == [2000] * 32
    assert gpu.kv_tokens >= 32 * (2000 + preserve.GROWTH_TOKENS)
    host = preserve.Scale.of("host", fake=False)
    assert (min(host.lengths()), max(host.lengths()), len(host.lengths())) == (500, 2000, 32)
    assert gpu.parking_bytes >= gpu.spec.kv_bytes_per_token("bfloat16") * gpu.kv_tokens


@pytest.mark.parametrize(("name", "billions"), [("1B", 1.24), ("8B", 8.03), ("30B", 29.5)])
def test_images_have_the_real_sizes(name: str, billions: float) -> None:
    assert name in GPU_SHAPES
    spec = gpu_shape(name)
    layout = plan_image(image_recipes(spec), "bfloat16", spec.to_dict())
    assert segment_bytes(layout) == pytest.approx(2e9 * billions, rel=0.01)
    assert fp8_layout(spec).weights_bytes == pytest.approx(1e9 * billions, rel=0.01)


@pytest.mark.parametrize("gib", sorted(HOST_SHAPES))
def test_images_of_the_host_have_the_sizes_they_are_named_by(gib: int) -> None:
    spec = host_shape(gib)
    layout = plan_image(image_recipes(spec), "float32", spec.to_dict())
    assert layout.weights_bytes == pytest.approx(gib << 30, rel=0.01)


def test_a_random_image_is_whole_and_its_numbers_are_finite() -> None:
    built = large_model("one@1", decoder(*TINY), 1, "float32")
    assert built.segment.sealed
    verify_image(built.segment.descriptor, built.manifest)
    with built.segment.map() as source:
        starts: set[bytes] = set()
        for entry in built.manifest.tensors:
            numbers = np.frombuffer(source.view(entry.offset_bytes, entry.size_bytes), np.float32)
            assert np.isfinite(numbers).all()
            assert 0 < np.abs(numbers).max() <= 1
            starts.add(numbers[:8].tobytes())
        matrices = [one for one in built.manifest.tensors if "norm" not in one.name]
        assert len(starts) == len(matrices) + 1
        del numbers
    other = same_image(built, "two@1")
    assert other.segment is built.segment
    assert other.manifest.digest == built.manifest.digest
    assert (
        large_model("one@1", decoder(*TINY), 2, "float32").manifest.digest != other.manifest.digest
    )


def test_every_other_way_brings_the_same_weights_in() -> None:
    built = large_model("one@1", decoder(*TINY), 1, "bfloat16")
    size_bytes = built.manifest.weights_bytes
    buffer = ctypes.create_string_buffer(size_bytes)
    place = ctypes.addressof(buffer)
    peers = Peers(built, torch.device("cpu"), parameters=place)
    with built.segment.map() as source:
        wanted = {
            one.name: bytes(source.view(one.offset_bytes, one.size_bytes))
            for one in built.manifest.tensors
        }
    for name, way in peers.names.items():
        # Copying out and in must find the weights there, which the ways before it brought.
        if "out" not in name:
            ctypes.memset(place, 0, size_bytes)
        way()
        for one in built.manifest.tensors:
            assert ctypes.string_at(place + one.offset_bytes, one.size_bytes) == wanted[one.name]
    assert set(peers.seconds()) == set(peers.names)
    descriptors = len(open_descriptors())
    peers.close()
    assert len(open_descriptors()) == descriptors - 1


def test_a_copy_to_hold_swaps_against_brings_every_byte() -> None:
    with Segment.create(4 << 20, "copied") as segment:
        content = bytes(range(256)) * (4 << 12)
        with segment.map_for_filling(huge_pages=False) as filling:
            filling.view()[:] = content
        copy = swap.Memcpy(4 << 20, segment)
        assert copy.seconds() > 0
        assert ctypes.string_at(copy.address, 4 << 20) == content
        copy.close()
    assert "hotbay-image:copied" not in Path("/proc/self/maps").read_text()


def test_ratios_are_of_neighbours_in_time() -> None:
    assert swap.ratio([(2.0, 1.0), (30.0, 10.0), (8.0, 2.0)]) == 3.0


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0e38], dtype=np.float32)
    found = torch.frombuffer(bytearray(encoded(values, "bfloat16")), dtype=torch.bfloat16)
    assert found[:3].tolist() == [1.0, -2.5, 0.0]
    assert found[3].item() == pytest.approx(3.0e38, rel=0.01)
    assert encoded(values, "float32") == values.tobytes()
