"""What preserving running requests adds to a swap, beside one without any and computing them again.

    python -m bench.preserve [--rounds 3] [--output bench/results/preserve.json]
    python -m bench.preserve --device cuda [--output bench/results/gpu-preserve.json] [--fake]

Two models of one shape share a partition. Each way first swaps to the second and back with nothing
running; then requests are begun for the first, and it swaps to and fro with these. That is done
three ways: `recompute`; `preserve` on a partition where the KV can stay on the device; and
`preserve` on one where the second model's own KV needs the room, so that it must be parked in host
memory. Measured are the exchange that takes the requests away, and the time from the order to bring
them back until each has its next token. On a GPU the models are of 8B and the requests of 2,000
tokens, and computing them again is left out; a dry run does it in small sizes over a fake driver.
The bench plays hotbayd and the gateway; the worker is the real process.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.results import Figure, report
from bench.shapes import Dtype, gpu_shape, large_model, same_image
from bench.swap_cuda import Setting, note_host_memory
from bench.traffic import CONTEXT_TOKENS, Traffic
from bench.worker import BenchWorker, BuiltModel, decoder
from engine.link import control
from engine.link.control import InFlight
from engine.models.spec import ModelSpec
from engine.worker.measures import kv_pages_min
from engine.worker.options import STEP_TOKENS

GROWTH_TOKENS = 256
"""What each request may grow by meanwhile, and still have room."""
ADDS_MAX = 1.05
MIB = 1 << 20
PRESENT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Way:
    """One way of treating the requests, with or without room for their KV."""

    name: str
    in_flight: InFlight
    roomy: bool


RECOMPUTE = Way("recompute", InFlight.RECOMPUTE, roomy=True)
PRESERVE = (
    Way("preserve, KV stays on the device", InFlight.PRESERVE, roomy=True),
    Way("preserve, KV is parked", InFlight.PRESERVE, roomy=False),
)


@dataclass(frozen=True)
class Scale:
    """What is swapped, and what runs meanwhile."""

    spec: ModelSpec
    dtype: Dtype
    requests: int
    tokens_min: int
    tokens_max: int
    parking_bytes: int
    ways: tuple[Way, ...]
    setting: Setting | None = None
    """None: on the host device."""

    @property
    def kv_tokens(self) -> int:
        """What the requests may come to, all together, and one of the longest in any case."""
        return max(CONTEXT_TOKENS, self.requests * (self.tokens_max + GROWTH_TOKENS))

    def lengths(self) -> list[int]:
        """Tokens of each prompt, evenly spread and shuffled."""
        spread = self.tokens_max - self.tokens_min
        found = [
            self.tokens_min + spread * place // max(1, self.requests - 1)
            for place in range(self.requests)
        ]
        random.Random(1).shuffle(found)
        return found

    @classmethod
    def of(cls, device: str, fake: bool) -> Scale:
        """The scale of a device, or a dry run's."""
        if device == "host":
            ways = (RECOMPUTE, *PRESERVE)
            return cls(decoder(131_072, 128, 4), "float32", 32, 500, 2000, 4 << 30, ways)
        setting, spec = Setting.of(fake), gpu_shape("8B", tiny=fake)
        if fake:
            return cls(spec, "bfloat16", 4, 200, 200, 64 * MIB, PRESERVE, setting)
        return cls(spec, "bfloat16", 32, 2000, 2000, 16 << 30, PRESERVE, setting)


@dataclass
class Measured:
    """Seconds of each round, and what the ledgers said."""

    plain_s: list[float] = field(default_factory=list)
    """Swaps away with nothing running."""
    away_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    copy_ms: list[float] = field(default_factory=list)
    park_ms: list[float] = field(default_factory=list)
    unpark_ms: list[float] = field(default_factory=list)
    parked_bytes: list[int] = field(default_factory=list)
    preserved: list[int] = field(default_factory=list)

    @property
    def adds(self) -> float:
        """How many times as long the swap away takes with the requests."""
        return statistics.median(self.away_s) / statistics.median(self.plain_s)


async def start(
    scale: Scale, way: Way, directory: Path, models: list[BuiltModel]
) -> tuple[BenchWorker, int]:
    """A worker with just the memory that the way asks for, and tokens of the second's context."""
    setting = scale.setting
    page_bytes = setting.page_bytes if setting else 2 * MIB
    manifest = models[0].manifest
    spec = control.EngineSpec("", "", scale.kv_tokens, 1, 1)
    kv_pages = kv_pages_min(spec, manifest, page_bytes, STEP_TOKENS)
    pages = -(-manifest.weights_bytes // page_bytes) + kv_pages
    memory_bytes = (pages + (kv_pages if way.roomy else 0)) * page_bytes
    options = ("--parking-bytes", str(scale.parking_bytes), "--stage-timeout-s", "120")
    if setting is None:
        worker = await BenchWorker.start(directory, memory_bytes, *options)
        await present(worker, memory_bytes)
    else:
        before = setting.used_bytes()
        total = memory_bytes + setting.workspace_bytes
        worker = await setting.start(directory, total, *options)
        await setting.until_used(before + memory_bytes)
    for built in models:
        await worker.attach(built)
    return worker, scale.kv_tokens


async def measure(scale: Scale, way: Way, rounds: int, models: list[BuiltModel]) -> Measured:
    """Rounds of one way, on a worker of its own; each kind's first round is not counted."""
    measured, (first, second) = Measured(), models
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        starting, second_tokens = await start(scale, way, Path(directory), models)
        first_limits = (CONTEXT_TOKENS, scale.requests, scale.requests)
        second_limits = (second_tokens, scale.requests, scale.requests)
        async with starting as worker:

            async def away(name: str) -> tuple[float, control.Ledger]:
                seconds, result = await worker.exchange(
                    name, first.model, second, second_limits, way.in_flight
                )
                return seconds, result.ledger

            async def back(name: str) -> control.Ledger:
                _, result = await worker.exchange(
                    name, second.model, first, first_limits, way.in_flight
                )
                return result.ledger

            await worker.exchange("first", None, first, first_limits)
            for number in range(rounds + 1):
                plain_s, _ = await away(f"plain {number} away")
                await back(f"plain {number} back")
                if number:
                    measured.plain_s.append(plain_s)
            traffic = Traffic(worker, scale.spec.vocabulary)
            traffic.begin(first.model, scale.lengths())
            await traffic.advanced()
            for number in range(rounds + 1):
                away_s, ledger = await away(f"{number} away")
                started = time.monotonic()
                returned = await back(f"{number} back")
                await traffic.advanced()
                resumed_s = time.monotonic() - started
                if number:
                    measured.away_s.append(away_s)
                    measured.resumed_s.append(resumed_s)
                    measured.copy_ms.append(ledger.copy_ms)
                    measured.park_ms.append(ledger.park_ms)
                    measured.unpark_ms.append(returned.unpark_ms)
                    measured.parked_bytes.append(ledger.parked_bytes)
                    measured.preserved.append(ledger.requests_preserved)
            traffic.end()
    check(scale, way, measured)
    return measured


def check(scale: Scale, way: Way, measured: Measured) -> None:
    """Raises RuntimeError when the requests were not treated as the way says."""
    kept = scale.requests if way.in_flight is InFlight.PRESERVE else 0
    if set(measured.preserved) != {kept} or any(measured.parked_bytes) == way.roomy:
        raise RuntimeError(
            f"{way.name}: {measured.preserved} of {scale.requests} requests were preserved, and "
            f"{measured.parked_bytes} bytes of their KV were parked"
        )


async def present(worker: BenchWorker, memory_bytes: int) -> None:
    """Wait until the worker's memory is there: its page faults are not what is measured."""
    process = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + PRESENT_TIMEOUT_S
    while process.memory_info().rss - process.memory_info().shared < memory_bytes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{memory_bytes} bytes were not present within a while")
        await asyncio.sleep(0.1)


def figures_of(scale: Scale, found: dict[str, Measured]) -> list[Figure]:
    """What is quoted. Only on a GPU, whose link is duplex, is there a bound; not in a dry run."""
    bounded = scale.setting is not None and not scale.setting.fake
    figures = []
    for name, one in found.items():
        away, resumed = statistics.median(one.away_s), statistics.median(one.resumed_s)
        preserve = name != RECOMPUTE.name
        figures += [
            Figure(
                f"{name}: swap away",
                f"{away * 1000:.0f} ms ({one.adds:.2f} x with nothing running)",
                f"<= {ADDS_MAX:g} x" if bounded and preserve else "",
                one.adds <= ADDS_MAX if bounded and preserve else None,
            ),
            Figure(f"{name}: back to a token of each", f"{resumed * 1000:.0f} ms"),
        ]
        if any(one.parked_bytes):
            figures.append(
                Figure(
                    f"{name}: {statistics.median(one.parked_bytes) / MIB:.0f} MiB out beside the "
                    "weights in",
                    f"{statistics.median(one.park_ms):.0f} ms out, "
                    f"{statistics.median(one.copy_ms):.0f} ms in, "
                    f"{statistics.median(one.unpark_ms):.0f} ms back",
                )
            )
    return figures


async def compare(scale: Scale, rounds: int, output: Path | None) -> bool:
    """All ways, one after the other. Raises RuntimeError."""
    note_host_memory(scale.spec.parameters * (4 if scale.dtype == "float32" else 2))
    first = large_model("first@1", scale.spec, 1, scale.dtype)
    models = [first, same_image(first, "second@1")]
    found = {way.name: await measure(scale, way, rounds, models) for way in scale.ways}
    device = "the host device" if scale.setting is None else "the GPU, 8B in bf16"
    dry = " (dry run)" if scale.setting is not None and scale.setting.fake else ""
    return report(
        f"preserving requests through a swap on {device}{dry}",
        figures_of(scale, found),
        parameters={
            "requests": scale.requests,
            "tokens": [scale.tokens_min, scale.tokens_max],
            "weights_bytes": first.manifest.weights_bytes,
            "kv_bytes_per_token": scale.spec.kv_bytes_per_token(scale.dtype),
            "rounds": rounds,
            "dtype": scale.dtype,
        },
        measurements={name: vars(one) for name, one in found.items()},
        output=output,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--fake", action="store_true", help="dry run over a fake driver")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    scale = Scale.of(values.device, values.fake)
    return 0 if asyncio.run(compare(scale, values.rounds, values.output)) else 1


if __name__ == "__main__":
    sys.exit(main())
