"""The benchmarks of a GPU, as far as they go without one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.device_costs import SMALL, main
from bench.swap_cuda import SHAPES, pinned_rate, shape
from bench.worker import encoded
from engine.models.layout import image_recipes
from swap.cuda_device import CudaDevice
from swap.fake_driver import FakeDriver
from swap.image import plan_image, segment_bytes


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


@pytest.mark.parametrize(("name", "billions"), [("1B", 1.24), ("8B", 8.03)])
def test_images_have_the_real_sizes(name: str, billions: float) -> None:
    assert name in SHAPES
    spec = shape(name)
    layout = plan_image(image_recipes(spec), "bfloat16", spec.to_dict())
    assert segment_bytes(layout) == pytest.approx(2e9 * billions, rel=0.01)


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0e38], dtype=np.float32)
    found = torch.frombuffer(bytearray(encoded(values, "bfloat16")), dtype=torch.bfloat16)
    assert found[:3].tolist() == [1.0, -2.5, 0.0]
    assert found[3].item() == pytest.approx(3.0e38, rel=0.01)
    assert encoded(values, "float32") == values.tobytes()
