"""How long a swap takes, on `device = host` held against a plain copy of the same bytes.

    python -m bench.swap [--gib 1] [--rounds 9] [--output bench/results/swap.json]
    python -m bench.swap --gib 4 [--output bench/results/swap-4gib.json]
    python -m bench.swap --count 1000 [--output bench/results/swap-count.json]
    python -m bench.swap --count 1000 --failures [--output bench/results/swap-failures.json]
    python -m bench.swap --device cuda --model 8B [--output bench/results/gpu-swap-8b.json] [--fake]

The first two forms alternate two models of 1 or 4 GiB on one worker. Each round copies as many
bytes with one memmove (one thread, both sides present) and at once swaps: from the sending of the
exchange to its commit, and again, with a request, to the incoming model's first token. Then it
brings the same weights in by four other ways (`bench.peers`). Ratios are of neighbours in time, and
their medians are quoted. The 4 GiB are one image under two names, or memory would not do; no figure
can tell. The third form alternates two small models and compares what the worker holds before and
after: pages, memory, descriptors, mappings, threads and processes. The fourth does so with failures
and all that can become of requests mixed in (`bench.swap_failures`). The last is
`bench.swap_cuda`'s.
The bench plays hotbayd and the gateway; the worker is the real process.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from bench.holdings import compared, holdings
from bench.peers import Peers
from bench.results import Figure, report
from bench.shapes import HOST_SHAPES, host_shape, large_model, same_image
from bench.swap_cuda import MODELS, measure_gpu_swaps
from bench.swap_failures import count_failures
from bench.worker import BenchWorker, BuiltModel, build_model, decoder
from swap.segment import Segment
from swap.virtual_memory import HUGE_PAGE_BYTES, VirtualMemory

VOCABULARY, HIDDEN, LAYERS = HOST_SHAPES[1]
SMALL_VOCABULARY, SMALL_HIDDEN, SMALL_LAYERS = 512, 128, 4
PROMPT = tuple(range(1, 9))
RATIO_MAX = 1.10
WARM_SWAPS = 4
SETTLE_SWAPS = 20
PEER_ROUNDS = 3
PRESENT_TIMEOUT_S = 120.0
KV_BYTES = 256 << 20
PHASES = ("drain_ms", "evict_ms", "copy_ms", "verify_ms", "total_ms")


class Memcpy:
    """One memmove of a segment's bytes into memory that is present, with huge pages if any."""

    def __init__(self, size_bytes: int, segment: Segment) -> None:
        self._memory = VirtualMemory()
        self._source = segment.map()
        self._memory.populate(self._source.address, size_bytes, write=False)
        self.address = self._memory.reserve(size_bytes, HUGE_PAGE_BYTES)
        self._memory.make_writable(self.address, size_bytes)
        self._memory.populate(self.address, size_bytes, write=True)
        self._size_bytes = size_bytes

    def seconds(self) -> float:
        started = time.monotonic()
        ctypes.memmove(self.address, self._source.address, self._size_bytes)
        return time.monotonic() - started

    def close(self) -> None:
        """Unmap both sides."""
        self._source.close()
        self._memory.release(self.address, self._size_bytes)


@dataclass
class Rounds:
    """What was measured, in seconds, by round; of each swap also the copy just before it."""

    committed: list[tuple[float, float]] = field(default_factory=list)
    first_token: list[tuple[float, float]] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    """The same request again, with all weights there."""
    ledgers: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def ratio(pairs: list[tuple[float, float]]) -> float:
    """The median of how many copies each swap took as long as."""
    return statistics.median(seconds / copy_s for seconds, copy_s in pairs)


def host_memory_needed(weights_bytes: int, images: int) -> int:
    """Images, the worker's memory, what the plain copy goes to, and the peers' file."""
    return (images + 3) * weights_bytes + 2 * KV_BYTES


async def measure_swaps(gib: int, rounds: int, output: Path | None) -> bool:
    """Alternate two large models; returns whether the bound was met.

    Raises RuntimeError when the host has not the memory.
    """
    first = large_model("bench-1@1", host_shape(gib), 1, "float32")
    weights_bytes = first.manifest.weights_bytes
    images = 2 if gib == 1 else 1
    needed = host_memory_needed(weights_bytes, images) - weights_bytes
    available = psutil.virtual_memory().available
    if available < needed:
        raise RuntimeError(f"{needed} bytes more of memory are needed, {available} are there")
    if images == 2:
        models = [first, large_model("bench-2@1", host_shape(gib), 2, "float32")]
    else:
        models = [first, same_image(first, "bench-2@1")]
    copy = Memcpy(weights_bytes, first.segment)
    peers = Peers(first, torch.device("cpu"), parameters=copy.address)
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        async with await start(Path(directory), weights_bytes + KV_BYTES, models) as worker:
            found = await alternate(worker, models, rounds, copy, peers)
    peers.close()
    return report(
        f"swap on the host device, {gib} GiB",
        figures_of(found),
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": weights_bytes + KV_BYTES,
            "images": images,
            "rounds": rounds,
            "vocabulary, hidden, layers": HOST_SHAPES[gib],
            "prompt_tokens": len(PROMPT),
            "dtype": "float32",
        },
        measurements=vars(found),
        output=output,
    )


async def alternate(
    worker: BenchWorker, models: list[BuiltModel], rounds: int, copy: Memcpy, peers: Peers
) -> Rounds:
    """Swap to and fro; the first swaps warm up and are not counted."""
    found = Rounds()
    outgoing: str | None = None
    for number in range(WARM_SWAPS // 2 + rounds):
        warm = number < WARM_SWAPS // 2
        copy_s = await asyncio.to_thread(copy.seconds)
        swap_s, _ = await worker.exchange(f"{number}-a", outgoing, models[0])
        again_s = await asyncio.to_thread(copy.seconds)
        token_s, result = await worker.swap(f"{number}-b", models[0].model, models[1], PROMPT)
        if result.error:
            raise RuntimeError(result.error)
        outgoing = models[1].model
        if warm:
            continue
        started = time.monotonic()
        await worker.answer(outgoing, PROMPT)
        found.step.append(time.monotonic() - started)
        found.committed.append((swap_s, copy_s))
        found.first_token.append((token_s, again_s))
        found.ledgers.append(msgspec.to_builtins(result.ledger))
        if len(found.step) <= PEER_ROUNDS:
            copy_s = await asyncio.to_thread(copy.seconds)
            for name, seconds in (await asyncio.to_thread(peers.seconds)).items():
                found.peers.setdefault(name, []).append((seconds, copy_s))
    return found


def figures_of(found: Rounds) -> list[Figure]:
    """What is quoted of the rounds."""
    copies = [copy_s for _, copy_s in (*found.committed, *found.first_token)]
    committed, first_token = ratio(found.committed), ratio(found.first_token)

    def quoted(pairs: list[tuple[float, float]]) -> str:
        seconds = statistics.median(seconds for seconds, _ in pairs)
        return f"{milliseconds(seconds)} ({ratio(pairs):.2f} x memcpy)"

    return [
        Figure("one memcpy of the image, one thread", milliseconds(statistics.median(copies))),
        Figure(
            "exchange sent to committed",
            quoted(found.committed),
            f"<= {RATIO_MAX:g} x memcpy",
            committed <= RATIO_MAX,
        ),
        Figure("exchange sent to first token", quoted(found.first_token)),
        Figure(
            "  that token again, all weights there", milliseconds(statistics.median(found.step))
        ),
        *(
            Figure(f"  {phase}", f"{statistics.median(one[phase] for one in found.ledgers):.1f} ms")
            for phase in PHASES
        ),
        *(
            Figure(name, f"{quoted(pairs)}, {ratio(pairs) / first_token:.1f} x ours to a token")
            for name, pairs in found.peers.items()
        ),
    ]


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
    figures += compared(before, after)
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


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=0, help="swap small models this many times")
    parser.add_argument("--failures", action="store_true", help="with --count: mix failures in")
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--gib", type=int, choices=sorted(HOST_SHAPES), default=1)
    parser.add_argument("--model", choices=MODELS, default="8B", help="with --device cuda")
    parser.add_argument("--fake", action="store_true", help="dry run over a fake driver")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    if values.device == "cuda":
        met = asyncio.run(
            measure_gpu_swaps(values.model, values.rounds, values.output, fake=values.fake)
        )
    elif values.count and values.failures:
        met = asyncio.run(count_failures(values.count, values.output))
    elif values.count:
        met = asyncio.run(count_swaps(values.count, values.output))
    else:
        met = asyncio.run(measure_swaps(values.gib, values.rounds, values.output))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
