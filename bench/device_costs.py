"""What a GPU's memory costs: copies by size, handles and mappings by size, pinning by chunk.

    python -m bench.device_costs [--output bench/results/gpu-device-costs.json]
    python -m bench.device_costs --fake

These figures are what page size, copy size and chunk size were chosen by, and what a swap is held
against. They are taken of the driver's own calls, through the Protocol that device memory uses.
With `--fake` the calls go to the fake driver, in small sizes: to see that the script works, for the
times then mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import Figure, report
from swap.cuda_driver import INVALID_VALUE, CudaDriver, Driver, DriverError, Rows
from swap.device import REGISTER_BYTES_MAX
from swap.fake_driver import FakeDriver
from swap.segment import Segment
from swap.virtual_memory import HUGE_PAGE_BYTES, VirtualMemory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
REPEATS = 5
ROWS = 64
"""Keys and values of 32 layers."""


@dataclass(frozen=True)
class Sizes:
    """In bytes."""

    copies: tuple[int, ...]
    handles: tuple[int, ...]
    mapped: int
    """Mapped in all, by handles of each size."""
    chunks: tuple[int, ...]
    registered: int
    row: int


REAL = Sizes(
    copies=(64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB),
    handles=(2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB),
    mapped=4 * GIB,
    chunks=(64 * MIB, 256 * MIB, GIB),
    registered=4 * GIB,
    row=32 * KIB,
)
SMALL = Sizes(
    copies=(64 * KIB, 4 * MIB),
    handles=(2 * MIB, 8 * MIB),
    mapped=16 * MIB,
    chunks=(2 * MIB, 8 * MIB),
    registered=16 * MIB,
    row=4 * KIB,
)


class Gpu:
    """The driver with the context of its first GPU current in this thread."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        driver.init()
        self.device = driver.device_get(0)
        driver.context_set_current(driver.primary_context_retain(self.device))

    def close(self) -> None:
        self.driver.primary_context_release(self.device)

    @contextmanager
    def mapped(self, size_bytes: int) -> Iterator[int]:
        """Accessible memory of one handle."""
        driver = self.driver
        handle = driver.mem_create(size_bytes, self.device)
        address = driver.mem_address_reserve(size_bytes, 0)
        driver.mem_map(address, size_bytes, handle)
        driver.mem_set_access(address, size_bytes, self.device)
        yield address
        driver.mem_unmap(address, size_bytes)
        driver.mem_address_free(address, size_bytes)
        driver.mem_release(handle)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copy_rates(gpu: Gpu, sizes: Sizes) -> dict[str, dict[int, float]]:
    """Bytes per second by kind of copy and size; the median of several."""
    driver, largest = gpu.driver, max(sizes.copies)
    memory = VirtualMemory()
    host = memory.reserve(largest, HUGE_PAGE_BYTES)
    memory.make_writable(host, largest)
    memory.populate(host, largest, write=True)
    stream = driver.stream_create()
    rates: dict[str, dict[int, float]] = {}
    with gpu.mapped(-(-largest // (2 * MIB)) * 2 * MIB) as address:

        def to_device(size: int) -> None:
            driver.memcpy_to_device(address, host, size, stream)
            driver.stream_synchronize(stream)

        def to_host(size: int) -> None:
            driver.memcpy_to_host(host, address, size, stream)
            driver.stream_synchronize(stream)

        def measure(copy: Callable[[int], None]) -> dict[int, float]:
            copy(largest)
            return {
                size: size
                / statistics.median(timed(functools.partial(copy, size)) for _ in range(REPEATS))
                for size in sizes.copies
            }

        rates["pageable, host to device"] = measure(to_device)
        for start in range(0, largest, REGISTER_BYTES_MAX):
            size = min(REGISTER_BYTES_MAX, largest - start)
            driver.host_register(host + start, size, read_only=False)
        rates["pinned, host to device"] = measure(to_device)
        rates["pinned, device to host"] = measure(to_host)
        for start in range(0, largest, REGISTER_BYTES_MAX):
            driver.host_unregister(host + start)
    driver.stream_destroy(stream)
    memory.release(host, largest)
    return rates


def row_rates(gpu: Gpu, sizes: Sizes) -> dict[str, float]:
    """Bytes per second of a parked block's copy out: its rows in one call, and one call each."""
    driver, memory = gpu.driver, VirtualMemory()
    rows, row_bytes, pitch_bytes = ROWS, sizes.row, 8 * sizes.row
    size_bytes = -(-rows * row_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    host = memory.reserve(size_bytes, HUGE_PAGE_BYTES)
    memory.make_writable(host, size_bytes)
    driver.host_register(host, size_bytes, read_only=False)
    stream = driver.stream_create()
    with gpu.mapped(-(-rows * pitch_bytes // (2 * MIB)) * 2 * MIB) as address:

        def as_one() -> None:
            shape = Rows(address, pitch_bytes, host, row_bytes, rows)
            driver.memcpy_rows(shape, stream, to_host=True)
            driver.stream_synchronize(stream)

        def one_by_one() -> None:
            for row in range(rows):
                driver.memcpy_to_host(
                    host + row * row_bytes, address + row * pitch_bytes, row_bytes, stream
                )
            driver.stream_synchronize(stream)

        rates = {
            name: rows * row_bytes / statistics.median(timed(copy) for _ in range(REPEATS))
            for name, copy in (("in one call", as_one), ("one call each", one_by_one))
        }
    driver.host_unregister(host)
    driver.stream_destroy(stream)
    memory.release(host, size_bytes)
    return rates


def handle_costs(gpu: Gpu, handle_bytes: int, total_bytes: int) -> dict[str, float]:
    """Seconds to create, map, make accessible, unmap and release `total_bytes` by handles."""
    driver, device = gpu.driver, gpu.device
    count = total_bytes // handle_bytes
    handles: list[int] = []
    address = driver.mem_address_reserve(count * handle_bytes, 0)

    def create() -> None:
        handles.extend(driver.mem_create(handle_bytes, device) for _ in range(count))

    def map_all() -> None:
        for index, handle in enumerate(handles):
            driver.mem_map(address + index * handle_bytes, handle_bytes, handle)

    def unmap_each() -> None:
        for index in range(count):
            driver.mem_unmap(address + index * handle_bytes, handle_bytes)

    def release() -> None:
        for handle in handles:
            driver.mem_release(handle)

    def give_access() -> None:
        driver.mem_set_access(address, count * handle_bytes, device)

    costs = {"create": timed(create)}
    maps, accesses, unmaps = [], [], []
    for _ in range(REPEATS):
        maps.append(timed(map_all))
        accesses.append(timed(give_access))
        try:
            unmaps.append(timed(lambda: driver.mem_unmap(address, count * handle_bytes)))
        except DriverError as error:  # which its documentation does not rule out
            if error.code != INVALID_VALUE:
                raise
            unmap_each()
    costs["map"] = statistics.median(maps)
    costs["access, one call"] = statistics.median(accesses)
    if unmaps:
        costs["unmap, one call"] = statistics.median(unmaps)
    map_all()
    give_access()
    costs["unmap, one by one"] = timed(unmap_each)
    costs["release"] = timed(release)
    driver.mem_address_free(address, count * handle_bytes)
    return costs


def registration_rates(gpu: Gpu, sizes: Sizes) -> dict[int, dict[str, float]]:
    """Bytes per second at which a segment that is present is pinned and unpinned, by chunk."""
    driver, rates = gpu.driver, {}
    with Segment.create(sizes.registered, "costs") as segment, segment.map() as source:
        VirtualMemory().populate(source.address, sizes.registered, write=False)
        for chunk in sizes.chunks:
            starts = range(source.address, source.address + sizes.registered, chunk)

            def pin(starts: range = starts, chunk: int = chunk) -> None:
                for start in starts:
                    driver.host_register(start, chunk, read_only=True)

            def unpin(starts: range = starts) -> None:
                for start in starts:
                    driver.host_unregister(start)

            rates[chunk] = {
                "pin": sizes.registered / timed(pin),
                "unpin": sizes.registered / timed(unpin),
            }
    return rates


def named(size_bytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes // KIB} KiB"


def measure(gpu: Gpu, sizes: Sizes, output: Path | None, fake: bool) -> bool:
    """Take all figures and report them."""
    copies = copy_rates(gpu, sizes)
    handles = {size: handle_costs(gpu, size, sizes.mapped) for size in sizes.handles}
    rows = row_rates(gpu, sizes)
    pinning = registration_rates(gpu, sizes)
    gib = sizes.mapped / GIB
    figures = [
        Figure(f"copy of {named(size)}, {kind}", f"{rate / 1e9:.2f} GB/s")
        for kind, rates in copies.items()
        for size, rate in rates.items()
    ]
    figures += [
        Figure(f"{ROWS} rows of {named(sizes.row)} out, {how}", f"{rate / 1e9:.2f} GB/s")
        for how, rate in rows.items()
    ]
    figures += [
        Figure(f"handles of {named(size)}: {what}", f"{seconds / gib * 1000:.2f} ms per GiB")
        for size, costs in handles.items()
        for what, seconds in costs.items()
    ]
    figures += [
        Figure(f"{what} in chunks of {named(size)}", f"{rate / 1e9:.2f} GB/s")
        for size, rates in pinning.items()
        for what, rate in rates.items()
    ]
    return report(
        "device costs over the fake driver" if fake else "device costs",
        figures,
        parameters={"mapped_bytes": sizes.mapped, "registered_bytes": sizes.registered},
        measurements={
            "copy_bytes_per_s": copies,
            "row_copy_bytes_per_s": rows,
            "handle_seconds": handles,
            "registration_bytes_per_s": pinning,
        },
        output=output,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; it holds nothing against a bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true", help="use the fake driver, in small sizes")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    fake = FakeDriver() if values.fake else None
    gpu = Gpu(fake if fake is not None else CudaDriver())
    met = measure(gpu, SMALL if values.fake else REAL, values.output, values.fake)
    gpu.close()
    if fake is not None:
        left = {name: count for name, count in fake.holdings().items() if count}
        fake.close()
        if left:
            raise RuntimeError(f"the fake GPU still holds {left}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
