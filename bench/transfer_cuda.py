"""How long an image takes to arrive on a GPU, with no worker around it.

For images that no engine serves yet, whose bytes cross the link like any others: what is measured
is what a swap does with them, mapping, copying in layer order and unmapping, by the same parts. The
rate it is held against is taken beside it by the same calls.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from bench.results import Figure, report
from bench.worker import BuiltModel
from swap.arena import PagePool, Region
from swap.device import REGISTER_BYTES_MAX, DeviceMemory
from swap.transfer import Transfer, measure_link

LINK_BYTES_MAX = 1 << 30
WARM_ROUNDS = 1
RATIO_MAX = 1.05


def measure_transfers(
    name: str, built: BuiltModel, device: DeviceMemory, rounds: int, output: Path | None
) -> bool:
    """Map, copy in and unmap an image several times; closes the device."""
    manifest, pool = built.manifest, PagePool(device)
    device.prefault(range(device.pages_total))
    rates, maps, copies, unmaps = [], [], [], []
    with built.segment.map() as source:
        starts = range(0, source.size_bytes, REGISTER_BYTES_MAX)
        for start in starts:
            size_bytes = min(REGISTER_BYTES_MAX, source.size_bytes - start)
            device.register(source.address + start, size_bytes)
        region = Region(pool, name, manifest.weights_bytes)
        for number in range(WARM_ROUNDS + rounds):
            rate = measure_link(pool, LINK_BYTES_MAX)
            started = time.monotonic()
            region.grow(region.pages_max)
            mapped = time.monotonic()
            transfer = Transfer(device, manifest, source, region)
            transfer.start()
            transfer.join()
            copied = time.monotonic()
            region.shrink(region.pages_max)
            ended = time.monotonic()
            if number >= WARM_ROUNDS:
                rates.append(rate)
                maps.append(mapped - started)
                copies.append(copied - mapped)
                unmaps.append(ended - copied)
        region.release()
        for start in starts:
            device.unregister(source.address + start)
    device.close()
    ratios = [
        seconds * rate / manifest.weights_bytes for seconds, rate in zip(copies, rates, strict=True)
    ]
    figures = [
        Figure("pinned copies, host to device", f"{statistics.median(rates) / 1e9:.2f} GB/s"),
        Figure(
            "the image's bytes, copied in layer order",
            f"{statistics.median(copies) * 1000:.1f} ms "
            f"({statistics.median(ratios):.2f} x its bytes at that rate)",
            f"about {RATIO_MAX:g} x",
        ),
        Figure("mapping its pages", f"{statistics.median(maps) * 1000:.2f} ms"),
        Figure("unmapping them", f"{statistics.median(unmaps) * 1000:.2f} ms"),
    ]
    return report(
        f"transfer to the GPU, {name}",
        figures,
        parameters={
            "weights_bytes": manifest.weights_bytes,
            "page_bytes": device.page_bytes,
            "rounds": rounds,
        },
        measurements={"rates": rates, "map_s": maps, "copy_s": copies, "unmap_s": unmaps},
        output=output,
    )
