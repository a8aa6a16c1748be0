"""Devices of every kind for tests, and how their memory is read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch

from swap.cuda_device import CudaDevice
from swap.device import DeviceMemory
from swap.fake_driver import FakeDriver
from swap.host_device import HostDevice

MIB = 1 << 20
FAKE = "cuda over a fake driver"
KEPT = "cuda over a fake driver, mappings kept"
NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
)
DeviceFactory = Callable[..., Any]


class ReadableCuda(CudaDevice):
    """Over a fake driver, whose memory is the host's: engines compute on it there."""

    kind: Literal["host", "cuda"] = "host"


@contextmanager
def device_factory(kind: str) -> Iterator[DeviceFactory]:
    """Opens devices by pages; all are closed in the end, and fake drivers have nothing left."""
    opened: list[Any] = []
    drivers: list[FakeDriver] = []

    def make(pages: int, page_bytes: int = 2 * MIB, **options: Any) -> Any:
        if kind == "host":
            device: Any = HostDevice(pages * page_bytes, page_bytes=page_bytes, **options)
        elif kind in (FAKE, KEPT):
            drivers.append(FakeDriver(**options))
            device = ReadableCuda(
                pages * page_bytes,
                page_bytes=page_bytes,
                driver=drivers[-1],
                keep_mappings=kind == KEPT,
            )
        else:
            if options:
                pytest.skip("a real link cannot be throttled")
            device = CudaDevice(pages * page_bytes, page_bytes=page_bytes)
        opened.append(device)
        return device

    yield make
    for device in opened:
        device.synchronize()
        device.close()
    for driver in drivers:
        assert set(driver.holdings().values()) == {0}, driver.holdings()
        driver.close()


def read(device: DeviceMemory, address: int, count: int) -> bytes:
    """What a device has at an address, once its copies are complete."""
    device.synchronize()
    buffer = ctypes.create_string_buffer(count)
    device.wait(device.copy_out(ctypes.addressof(buffer), address, count))
    return buffer.raw
