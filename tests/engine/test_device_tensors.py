"""Tensors over addresses: by DLPack on the host, where what a GPU would do can be tried."""

from __future__ import annotations

import gc

import pytest
import torch

from engine.device_tensors import DLPACK_CPU, bytes_at, placed, tensor_by_dlpack
from swap.virtual_memory import VirtualMemory, view_of

PAGE = 2 << 20


@pytest.fixture
def address():
    memory = VirtualMemory()
    start = memory.reserve(4 * PAGE, PAGE)
    memory.make_writable(start, PAGE)  # the rest would fault
    yield start
    memory.release(start, 4 * PAGE)


@pytest.mark.parametrize(
    "make",
    [lambda at: bytes_at("host", at, 4 * PAGE), lambda at: tensor_by_dlpack(at, 4 * PAGE, 1)],
)
def test_a_tensor_is_the_memory_and_making_it_touches_nothing(address, make):
    tensor = make(address)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (4 * PAGE,))
    assert tensor.data_ptr() == address
    floats = tensor[256 : 256 + 32].view(torch.bfloat16).view(4, 4)
    floats.fill_(1.0)
    assert bytes(view_of(address + 256, 4)) == b"\x80\x3f\x80\x3f"
    view_of(address, 1)[0] = 7
    assert tensor[0] == 7


def test_views_outlive_the_tensor_they_were_made_of(address):
    view = tensor_by_dlpack(address, PAGE, DLPACK_CPU)[:64].view(torch.float32)
    gc.collect()
    view.fill_(2.0)
    assert view.sum() == 32.0


def test_what_describes_tensors_is_freed_with_them(address):
    def resident_bytes() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(20_000):
        tensor_by_dlpack(address, 64, DLPACK_CPU)
    before = resident_bytes()
    for _ in range(60_000):
        tensor_by_dlpack(address, 64, DLPACK_CPU)
    assert resident_bytes() - before < 4 << 20  # kept, they would take 9 MB


def test_on_the_host_nothing_is_moved():
    tensor = torch.arange(3)
    assert placed(tensor, torch.device("cpu")) is tensor
