"""How long a swap takes, on `device = host` held against a plain copy of the same bytes.

    python -m bench.swap [--rounds 9] [--output bench/results/swap.json]
    python -m bench.swap --count 1000 [--output bench/results/swap-count.json]
    python -m bench.swap --device cuda --model 8B [--output bench/results/gpu-swap-8b.json]

The first form alternates two models of 1 GiB on one worker. Each round first copies as many bytes
with one memmove between buffers that are present already, then measures from the sending of the
exchange to the arrival of the incoming model's first token. The second form alternates two small
models and compares what the worker holds before and after: pages, memory, descriptors, mappings,
threads and processes. The third is `bench.swap_cuda`'s. The bench plays hotbayd and the gateway;
the worker is the real process.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench.results import Figure, report
from bench.swap_cuda import SHAPES, measure_gpu_swaps
from bench.worker import BenchWorker, BuiltModel, build_model, decoder
from engine.link import control
from swap.segment import Segment
from swap.virtual_memory import HUGE_PAGE_BYTES, VirtualMemory

VOCABULARY, HIDDEN, LAYERS = 131_072, 512, 34
SMALL_VOCABULARY, SMALL_HIDDEN, SMALL_LAYERS = 512, 128, 4
PROMPT = tuple(range(1, 9))
RATIO_MAX, OVERHEAD_S = 1.25, 0.05
WARM_SWAPS = 4
SETTLE_SWAPS = 20
PRESENT_TIMEOUT_S = 120.0
SLACK = {"resident_bytes": 8 << 20, "mappings": 4}
"""What allocators may hold more of after many swaps than before; a leak is one per swap."""


class Memcpy:
    """One memmove of a segment's bytes into memory that is present, with huge pages if any."""

    def __init__(self, size_bytes: int, segment: Segment) -> None:
        self._memory = VirtualMemory()
        self._source = segment.map()
        self._memory.populate(self._source.address, size_bytes, write=False)
        self._address = self._memory.reserve(size_bytes, HUGE_PAGE_BYTES)
        self._memory.make_writable(self._address, size_bytes)
        self._memory.populate(self._address, size_bytes, write=True)
        self._size_bytes = size_bytes

    def seconds(self) -> float:
        started = time.monotonic()
        ctypes.memmove(self._address, self._source.address, self._size_bytes)
        return time.monotonic() - started


async def measure_swaps(rounds: int, output: Path | None) -> bool:
    """Alternate two large models; returns whether the bound was met."""
    spec = decoder(VOCABULARY, HIDDEN, LAYERS)
    models = [build_model(f"bench-{seed}@1", spec, seed) for seed in (1, 2)]
    weights_bytes = models[0].manifest.weights_bytes
    copy = Memcpy(weights_bytes, models[0].segment)
    memory_bytes = weights_bytes + (256 << 20)
    copies, swaps, ledgers = [], [], []
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await start(Path(directory), memory_bytes, models)
        outgoing: str | None = None
        for number in range(WARM_SWAPS + rounds):
            incoming = models[number % 2]
            copy_s = await asyncio.to_thread(copy.seconds)
            swap_s, result = await worker.swap(f"{number}", outgoing, incoming, PROMPT)
            if result.error:
                raise RuntimeError(result.error)
            outgoing = incoming.model
            if number >= WARM_SWAPS:
                copies.append(copy_s)
                swaps.append(swap_s)
                ledgers.append(msgspec.to_builtins(result.ledger))
        await worker.close()
    copy_s, swap_s = statistics.median(copies), statistics.median(swaps)
    limit_s = RATIO_MAX * copy_s + OVERHEAD_S
    phases = ("drain_ms", "evict_ms", "copy_ms", "verify_ms", "total_ms")
    figures = [
        Figure("one memcpy of the image", milliseconds(copy_s)),
        Figure(
            "exchange sent to first token",
            f"{milliseconds(swap_s)} ({swap_s / copy_s:.2f} x memcpy)",
            f"<= {RATIO_MAX:g} x memcpy + {OVERHEAD_S * 1000:.0f} ms = {milliseconds(limit_s)}",
            swap_s <= limit_s,
        ),
        *(
            Figure(f"  {phase}", f"{statistics.median(one[phase] for one in ledgers):.1f} ms")
            for phase in phases
        ),
    ]
    return report(
        "swap on the host device",
        figures,
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": memory_bytes,
            "rounds": rounds,
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "prompt_tokens": len(PROMPT),
            "dtype": "float32",
        },
        measurements={"memcpy_s": copies, "first_token_s": swaps, "ledgers": ledgers},
        output=output,
    )


async def count_swaps(count: int, output: Path | None) -> bool:
    """Swap two small models many times; returns whether every count is back where it was."""
    spec = decoder(SMALL_VOCABULARY, SMALL_HIDDEN, SMALL_LAYERS)
    models = [build_model(f"small-{seed}@1", spec, seed) for seed in (1, 2)]
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await start(Path(directory), 64 << 20, models)
        expected: dict[str, int] = {}
        outgoing: str | None = None
        before: dict[str, int] = {}
        started = time.monotonic()
        for number in range(SETTLE_SWAPS + count):
            incoming = models[number % 2]
            if number == SETTLE_SWAPS:
                before, started = await holdings(worker), time.monotonic()
            _, result = await worker.swap(f"{number}", outgoing, incoming, PROMPT)
            token = await worker.answer(incoming.model, PROMPT)
            if result.error or expected.setdefault(incoming.model, token) != token:
                raise RuntimeError(f"swap {number}: {result.error or 'another token'}")
            outgoing = incoming.model
        seconds = time.monotonic() - started
        after = await holdings(worker)
        await worker.close()
    figures = [Figure("swaps", f"{count} in {seconds:.1f} s, {seconds / count * 1000:.1f} ms each")]
    for name, value in before.items():
        slack = SLACK.get(name, 0)
        figures.append(
            Figure(
                name,
                f"{value} before, {after[name]} after",
                "no more" if not slack else f"at most {slack} more",
                after[name] <= value + slack,
            )
        )
    return report(
        f"{count} swaps",
        figures,
        parameters={"count": count, "weights_bytes": models[0].manifest.weights_bytes},
        measurements={"before": before, "after": after, "seconds": seconds},
        output=output,
    )


async def start(directory: Path, memory_bytes: int, models: list[BuiltModel]) -> BenchWorker:
    """A worker with all its memory present and both images attached."""
    worker = await BenchWorker.start(directory, memory_bytes)
    for built in models:
        await worker.attach(built)
    process = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + PRESENT_TIMEOUT_S
    while process.memory_info().rss - process.memory_info().shared < memory_bytes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{memory_bytes} bytes were not present within a while")
        await asyncio.sleep(0.1)
    return worker


async def holdings(worker: BenchWorker) -> dict[str, int]:
    """What the worker holds, from outside and by its own account."""
    process = psutil.Process(worker.process.pid)
    state = await worker.call(control.Describe())
    return {
        "pages_in_use": state.pages_total - state.pages_free,
        "resident_bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "mappings": len(process.memory_maps(grouped=False)),
        "threads": process.num_threads(),
        "processes": 1 + len(process.children(recursive=True)),
    }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=0, help="swap small models this many times")
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--model", choices=sorted(SHAPES), default="8B", help="with --device cuda")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    if values.device == "cuda":
        met = asyncio.run(measure_gpu_swaps(values.model, values.rounds, values.output))
    elif values.count:
        met = asyncio.run(count_swaps(values.count, values.output))
    else:
        met = asyncio.run(measure_swaps(values.rounds, values.output))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
