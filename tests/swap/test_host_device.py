"""What is particular to host memory as a device: page tables, faults, pacing, refusals."""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swap.errors import DeviceError, DeviceMisuse
from swap.host_device import HostDevice
from swap.virtual_memory import VirtualMemory, view_of

MIB = 1 << 20
PAGE = 2 * MIB

TOUCH = """
import ctypes, sys
from swap.host_device import HostDevice
device = HostDevice(8 << 20)
base = device.reserve(4 << 20)
device.map(base, (0, 1))
ctypes.memset(base, 1, 4 << 20)
{before}
print("touching", flush=True)
{touch}
print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("before", "touch", "dies"),
    [
        ("device.unmap(base, 1)", "ctypes.string_at(base, 1)", True),
        ("device.unmap(base, 1)", "ctypes.memset(base + 4096, 0, 1)", True),
        ("device.unmap(base, 1)", "ctypes.string_at(base + (2 << 20), 1)", False),
        ("other = device.reserve(2 << 20)", "ctypes.string_at(other, 1)", True),
        ("", "ctypes.string_at(device._home, 1)", True),
    ],
)
def test_an_access_without_a_page_kills_the_process(before, touch, dies):
    result = subprocess.run(
        [sys.executable, "-c", TOUCH.format(before=before, touch=touch)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.startswith("touching"), result.stderr
    assert ("survived" not in result.stdout) == dies
    assert result.returncode == (-signal.SIGSEGV if dies else 0)


def test_vacated_addresses_are_never_up_for_grabs():
    """While pages move to and fro, other threads' mappings never land in a reserved range."""
    device = HostDevice(8 * PAGE)
    base = device.reserve(8 * PAGE)
    inside, stop = [], threading.Event()

    def map_and_unmap() -> None:
        while not stop.is_set():
            with mmap.mmap(-1, PAGE) as other:
                address = ctypes.addressof(ctypes.c_char.from_buffer(other))
                if base <= address < base + 8 * PAGE:
                    inside.append(address)

    threads = [threading.Thread(target=map_and_unmap) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        device.map(base, range(8))
        device.unmap(base, 8)
    stop.set()
    for thread in threads:
        thread.join()
    device.close()
    assert inside == []


def test_the_throttle_paces_copies_to_the_link(stepped_clock):
    clock = stepped_clock()
    device = HostDevice(4 * PAGE, link_bytes_per_s=MIB, clock=clock)
    base = device.reserve(4 * PAGE)
    device.map(base, range(4))
    source = ctypes.create_string_buffer(PAGE)
    for _ in range(3):
        device.copy_in(base, ctypes.addressof(source), PAGE)
    assert clock.now == pytest.approx(6.0)
    clock.now += 100  # an idle link saves nothing up
    device.copy_in(base, ctypes.addressof(source), MIB)
    assert clock.sleeps[-1] == pytest.approx(1.0)
    device.close()


def test_a_map_that_fails_half_way_is_undone(monkeypatch):
    device = HostDevice(6 * PAGE)
    base = device.reserve(6 * PAGE)
    device.map(base, (5, 3, 1))
    view_of(base, 1)[0] = 9
    device.unmap(base, 3)
    calls, move = [], VirtualMemory.move

    def refuse_second(memory, source, destination, size_bytes):
        calls.append(destination)
        if len(calls) == 2:
            raise DeviceError("refused")
        move(memory, source, destination, size_bytes)

    monkeypatch.setattr(VirtualMemory, "move", refuse_second)
    with pytest.raises(DeviceError, match="refused"):
        device.map(base, (5, 3, 1))
    monkeypatch.undo()
    assert device.statistics().pages_mapped == 0
    device.map(base, (1, 3, 5))
    assert view_of(base + 2 * PAGE, 1)[0] == 9
    device.close()


def test_the_systems_refusal_says_what_to_raise():
    with pytest.raises(DeviceError, match=r"reserve address space of .* bytes: .*memory"):
        HostDevice(1 << 50)


@pytest.mark.parametrize(
    "options", [{"page_bytes": MIB}, {"page_bytes": 0}, {"link_bytes_per_s": 0}]
)
def test_impossible_devices_are_refused(options):
    with pytest.raises(DeviceMisuse):
        HostDevice(8 * MIB, **options)
    with pytest.raises(DeviceMisuse, match="hold no page"):
        HostDevice(MIB)


def test_prefaulting_while_pages_move():
    device = HostDevice(16 * PAGE)
    base = device.reserve(16 * PAGE)
    done = threading.Event()

    def prefault() -> None:
        for page in range(16):
            device.prefault((page,))
        done.set()

    thread = threading.Thread(target=prefault)
    thread.start()
    while not done.is_set():
        device.map(base, range(16))
        device.unmap(base, 16)
    thread.join()
    assert device.statistics().pages_present == 16
    device.close()
