"""What preserving running requests adds to a swap on `device = host`, beside computing them again.

    python -m bench.preserve [--rounds 3] [--output bench/results/preserve.json]

Two models share a partition, the second larger than the first by more than its requests' KV. Each
round begins 32 requests of 500 to 2,000 tokens for the first, swaps to the second, and back. That
is done three ways: `recompute`; `preserve` on a partition where the KV can stay on the device; and
`preserve` on one where it must be parked in host memory. Measured are the exchange that takes the
requests away, and the time from the order to bring them back until each has its next token. The
bench plays hotbayd and the gateway; the worker is the real process.
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
from bench.worker import BenchWorker, BuiltModel, build_model, decoder
from engine.link import control, tokens
from engine.link.control import InFlight

VOCABULARY, LARGER_VOCABULARY = 131_072, 229_376
HIDDEN, LAYERS = 128, 4
REQUESTS, TOKENS_MIN, TOKENS_MAX = 32, 500, 2000
CONTEXT_TOKENS = 4096
"""Long enough that no request ends while the others are still begun."""
PARKING_BYTES = 4 << 30
MIB = 1 << 20
SLACK_BYTES = 48 * MIB
PRESENT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Way:
    """One way of treating the requests, with or without room for their KV."""

    name: str
    in_flight: InFlight
    roomy: bool


WAYS = (
    Way("recompute", InFlight.RECOMPUTE, roomy=True),
    Way("preserve, KV stays on the device", InFlight.PRESERVE, roomy=True),
    Way("preserve, KV is parked", InFlight.PRESERVE, roomy=False),
)


@dataclass
class Measured:
    """Seconds of each round, and what the ledgers said."""

    away_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    copy_ms: list[float] = field(default_factory=list)
    park_ms: list[float] = field(default_factory=list)
    unpark_ms: list[float] = field(default_factory=list)
    parked_bytes: list[int] = field(default_factory=list)
    preserved: list[int] = field(default_factory=list)


class Traffic:
    """The requests' answers, read all the time so that the worker never waits for credit."""

    def __init__(self, worker: BenchWorker) -> None:
        self._worker = worker
        self._seen: dict[int, int] = {}
        self._heard = asyncio.Event()
        self._numbers = iter(range(1, 1 << 30))
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            step, _ = await self._worker.gateway.receive()
            self._worker.gateway.post(tokens.Grant(1))
            for output in step.outputs:
                if output.finish is not None:
                    raise RuntimeError(f"a request ended: {output.finish} {output.error}")
                if output.request in self._seen:
                    self._seen[output.request] += len(output.tokens)
            self._heard.set()

    def begin(self, model: str, lengths: list[int]) -> None:
        for length in lengths:
            number = next(self._numbers)
            self._seen[number] = 0
            prompt = tuple((number + place) % VOCABULARY for place in range(length))
            sampling = tokens.Sampling(max_tokens=CONTEXT_TOKENS, temperature=0.0, ignore_eos=True)
            self._worker.gateway.post(tokens.Submit(number, model, prompt, sampling))

    async def advanced(self) -> None:
        """Wait until every request has one token more than now."""
        before = dict(self._seen)
        while any(self._seen[number] <= count for number, count in before.items()):
            self._heard.clear()
            waiting = asyncio.create_task(self._heard.wait())
            await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self.task.done():
                self.task.result()

    def end(self) -> None:
        for number in self._seen:
            self._worker.gateway.post(tokens.Cancel(number))
        self._seen.clear()


async def measure(way: Way, rounds: int, models: list[BuiltModel], kv_bytes: int) -> Measured:
    """Rounds of one way, on a worker of its own; the first round warms up and is not counted."""
    first, second = (built.manifest.weights_bytes for built in models)
    assert second - first > kv_bytes, "a tight partition must have no room for both"
    memory_bytes = second + SLACK_BYTES + (kv_bytes if way.roomy else 0)
    measured, draw = Measured(), random.Random(1)
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        arguments = ("--parking-bytes", str(PARKING_BYTES), "--stage-timeout-s", "120")
        worker = await BenchWorker.start(Path(directory), memory_bytes, *arguments)
        for built in models:
            await worker.attach(built)
        await present(worker, memory_bytes)
        traffic = Traffic(worker)
        await exchange(worker, "first", None, models[0], way.in_flight)
        for number in range(rounds + 1):
            spread = range(REQUESTS)
            lengths = [
                TOKENS_MIN + (TOKENS_MAX - TOKENS_MIN) * place // (REQUESTS - 1) for place in spread
            ]
            draw.shuffle(lengths)
            traffic.begin(models[0].model, lengths)
            await traffic.advanced()
            away_s, away = await exchange(
                worker, f"{number}-away", models[0], models[1], way.in_flight
            )
            started = time.monotonic()
            back_s, back = await exchange(
                worker, f"{number}-back", models[1], models[0], way.in_flight
            )
            await traffic.advanced()
            resumed_s = time.monotonic() - started
            traffic.end()
            if number:
                measured.away_s.append(away_s)
                measured.back_s.append(back_s)
                measured.resumed_s.append(resumed_s)
                measured.copy_ms.append(away.copy_ms)
                measured.park_ms.append(away.park_ms)
                measured.unpark_ms.append(back.unpark_ms)
                measured.parked_bytes.append(away.parked_bytes)
                measured.preserved.append(away.requests_preserved)
        traffic.task.cancel()
        await worker.close()
    return measured


async def exchange(
    worker: BenchWorker,
    operation: str,
    outgoing: BuiltModel | None,
    incoming: BuiltModel,
    in_flight: InFlight,
) -> tuple[float, control.Ledger]:
    """Seconds from sending an exchange to its answer, and its ledger."""
    digest = incoming.manifest.digest
    request = control.Exchange(
        operation=operation,
        outgoing=(outgoing.model,) if outgoing else (),
        incoming=control.EngineSpec(incoming.model, digest, CONTEXT_TOKENS, REQUESTS, REQUESTS),
        in_flight=in_flight,
    )
    started = time.monotonic()
    result = (await worker.call(request)).result
    seconds = time.monotonic() - started
    if result.error:
        raise RuntimeError(result.error)
    return seconds, result.ledger


async def present(worker: BenchWorker, memory_bytes: int) -> None:
    """Wait until the worker's memory is there: its page faults are not what is measured."""
    process = psutil.Process(worker.process.pid)
    deadline = time.monotonic() + PRESENT_TIMEOUT_S
    while process.memory_info().rss - process.memory_info().shared < memory_bytes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{memory_bytes} bytes were not present within a while")
        await asyncio.sleep(0.1)


async def compare(rounds: int, output: Path | None) -> bool:
    """All ways, one after the other."""
    spec = decoder(VOCABULARY, HIDDEN, LAYERS)
    larger = decoder(LARGER_VOCABULARY, HIDDEN, LAYERS)
    models = [build_model("first@1", spec, 1), build_model("second@1", larger, 2)]
    kv_bytes = spec.kv_bytes_per_token("float32") * REQUESTS * (TOKENS_MIN + TOKENS_MAX) // 2
    found = {way.name: await measure(way, rounds, models, kv_bytes) for way in WAYS}
    plain = statistics.median(found["recompute"].away_s)
    again = statistics.median(found["recompute"].resumed_s)
    figures = []
    for name, one in found.items():
        away, resumed = statistics.median(one.away_s), statistics.median(one.resumed_s)
        parked = statistics.median(one.parked_bytes)
        figures += [
            Figure(f"{name}: swap away", f"{away * 1000:.0f} ms ({away / plain:.2f} x recompute)"),
            Figure(
                f"{name}: back to a token of each",
                f"{resumed * 1000:.0f} ms ({resumed / again:.2f} x recompute)",
            ),
        ]
        if parked:
            copy, park = statistics.median(one.copy_ms), statistics.median(one.park_ms)
            figures.append(
                Figure(
                    f"{name}: {parked / MIB:.0f} MiB out beside the weights in",
                    f"{park:.0f} ms out, {copy:.0f} ms in, "
                    f"{statistics.median(one.unpark_ms):.0f} ms back",
                )
            )
    return report(
        "preserving requests through a swap on the host device",
        figures,
        parameters={
            "requests": REQUESTS,
            "tokens": [TOKENS_MIN, TOKENS_MAX],
            "weights_bytes": [built.manifest.weights_bytes for built in models],
            "kv_bytes": kv_bytes,
            "rounds": rounds,
            "dtype": "float32",
        },
        measurements={name: vars(one) for name, one in found.items()},
        output=output,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    return 0 if asyncio.run(compare(values.rounds, values.output)) else 1


if __name__ == "__main__":
    sys.exit(main())
