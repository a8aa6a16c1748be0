"""Many swaps with failures mixed in, and whether every byte is back where it was.

Owns one worker with three models, one of them packed, in memory so short that KV is parked. What
comes next is drawn from a seed: every policy, staging, unloading, images unmapped and mapped again,
and failing or hanging at every fail point. After each change exactly one model must be ACTIVE, the
right one, and answer with its own token; in the end every request must have ended, and nothing more
be held than at first.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.holdings import compared, holdings
from bench.results import Figure, report
from bench.worker import BenchWorker, BuiltModel, build_model, decoder
from engine.link import control, tokens
from engine.link.control import Canary, EngineStatus, InFlight
from engine.worker.failpoints import Action, FailPoint

PAGE_BYTES = 2 << 20
MEMORY_PAGES = 14
PARKING_BYTES = 8 << 20
LIMITS = (128, 8, 64)
PROMPT_TOKENS = 60
ANSWER_TOKENS = 24
STAGE_TIMEOUT_S = 0.5
SETTLE_SWAPS = 200
"""Until allocators have what they will ever keep."""
SHARE, KV_SHARE = 0.03, 0.2
"""How often each fail point fires; those that cost KV, and no swap, oftener."""
KV_POINTS = (FailPoint.PARKING, FailPoint.UNPARKING)
SEED = 7
END_TIMEOUT_S = 30.0
SLACK = {"resident_bytes": (8 << 20) + PARKING_BYTES, "mappings": 16}
"""Parking is made present by its first use; threads that come and go leave arenas behind."""
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
"""torch's matrix products keep code for each number of rows that ever came, up to 1,024 of them and
some 200 MB. What swaps leave behind would not show beside that."""


def switched_on() -> str:
    """Every fail point, raising and hanging by turns."""
    entries = []
    for number, point in enumerate(FailPoint):
        action = (Action.RAISE, Action.HANG)[number % 2]
        # One that gives up for good at the second try would fail the model.
        action = Action.RAISE if point is FailPoint.ROLLING_BACK else action
        entries.append(f"{point}~{KV_SHARE if point in KV_POINTS else SHARE}={action}")
    return ",".join(entries)


class Streams:
    """The gateway's side: requests under way, and how each ended."""

    def __init__(self, worker: BenchWorker) -> None:
        self._worker = worker
        self._numbers = iter(range(1, 1 << 40))
        self._open: dict[int, asyncio.Future[tuple[tokens.Finish, list[int]]]] = {}
        self._tokens: dict[int, list[int]] = {}
        self.ends: collections.Counter[str] = collections.Counter()
        self._reading = asyncio.create_task(self._read())

    def submit(self, model: str, prompt: tuple[int, ...], count: int) -> asyncio.Future[Any]:
        """A request; the future has its finish and its tokens."""
        number = next(self._numbers)
        self._open[number] = asyncio.get_running_loop().create_future()
        self._tokens[number] = []
        sampling = tokens.Sampling(max_tokens=count, temperature=0.0)
        self._worker.gateway.post(tokens.Submit(number, model, prompt, sampling))
        return self._open[number]

    async def token(self, model: str, prompt: tuple[int, ...]) -> int:
        """One greedy token. Raises RuntimeError when it does not come."""
        async with asyncio.timeout(END_TIMEOUT_S):
            finish, drawn = await self.submit(model, prompt, 1)
        if finish is not tokens.Finish.LENGTH:
            raise RuntimeError(f"{model} answered {finish}")
        return int(drawn[0])

    async def ended(self) -> None:
        """Return once every request has ended. Raises TimeoutError."""
        async with asyncio.timeout(END_TIMEOUT_S):
            await asyncio.gather(*self._open.values())

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self) -> None:
        while True:
            step, _ = await self._worker.gateway.receive()
            self._worker.gateway.post(tokens.Grant(1))
            for output in step.outputs:
                self._tokens[output.request] += output.tokens
                if output.finish is not None:
                    self.ends[output.finish.value] += 1
                    drawn = self._tokens.pop(output.request)
                    self._open.pop(output.request).set_result((output.finish, drawn))


class Mix:
    """What happens to the worker, drawn from a seed."""

    def __init__(self, worker: BenchWorker, models: list[BuiltModel]) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.swaps = 0
        self.streams = Streams(worker)
        self._worker = worker
        self._models = {one.model: one for one in models}
        self._draw = random.Random(SEED)
        self._active = ""
        self._expected: dict[str, int] = {}
        self._canaries: dict[str, Canary] = {}
        self._operations = 0

    async def swap(self) -> None:
        """One swap, after whatever else is drawn. Raises RuntimeError when anything is not so."""
        draw = self._draw
        for number in range(draw.randrange(4)):
            prompt = tuple((number + place) % 200 for place in range(PROMPT_TOKENS))
            self.streams.submit(self._active, prompt, ANSWER_TOKENS)
        if draw.random() < 0.2:
            await self._stage(draw.choice(self._others()))
        if draw.random() < 0.1:
            await self._unload(draw.choice(self._others()))
        incoming = draw.choice(self._others())
        await self._bring(incoming, draw.choice(list(InFlight)), keep=draw.random() < 0.5)
        self.swaps += 1

    async def reset(self) -> None:
        """Take every model off, and see every request ended."""
        state = await self._worker.call(control.Describe())
        models = tuple(one.model for one in state.engines)
        while models:
            request = control.Exchange(self._operation(), models, discard=True)
            result = await self._exchange(request)
            models = () if result is not None and not result.error else models
        self._active = ""
        await self.streams.ended()

    async def begin(self) -> None:
        """Bring a first model in, however often that fails."""
        while not self._active:
            await self._bring(next(iter(self._models)), InFlight.DRAIN, keep=False)

    def _others(self) -> list[str]:
        return [name for name in self._models if name != self._active]

    def _operation(self) -> str:
        self._operations += 1
        return f"{self._operations}"

    def _spec(self, name: str) -> control.EngineSpec:
        return control.EngineSpec(name, self._models[name].manifest.digest, *LIMITS)

    async def _bring(self, name: str, policy: InFlight, *, keep: bool) -> None:
        # Every second model has a canary.
        canary = self._canaries.get(name, Canary((1, 2, 3)))
        with_canary = list(self._models).index(name) % 2 == 0
        outgoing = (self._active,) if self._active else ()
        request = control.Exchange(
            operation=self._operation(),
            outgoing=outgoing,
            incoming=self._spec(name),
            in_flight=policy,
            drain_timeout_s=0.01,
            keep_staged=keep,
            canary=canary if with_canary else None,
        )
        result = await self._exchange(request)
        if result is not None and not result.error:
            self._active = name
            if result.canary is not None:
                expected = {result.canary.runtime: result.canary.tokens}
                self._canaries[name] = Canary(canary.prompt, expected)
        await self._check()

    async def _exchange(self, request: Any) -> control.ExchangeResult | None:
        """Its result; None when it was refused."""
        reply, _ = await self._worker.hotbayd.call(request, (), timeout_s=END_TIMEOUT_S)
        if isinstance(reply, control.Failed):
            self.outcomes[f"refused: {reply.reason}"] += 1
            return None
        result: control.ExchangeResult = reply.result
        what = f"rolled back: {result.error_reason}" if result.error else "committed"
        self.outcomes[what] += 1
        return result

    async def _stage(self, name: str) -> None:
        """Stage a model; one whose copy hangs has no deadline, and is abandoned."""
        request = control.StageWeights(self._operation(), self._spec(name), displace=True)
        staging = asyncio.create_task(self._exchange(request))
        done, _ = await asyncio.wait({staging}, timeout=STAGE_TIMEOUT_S)
        if not done:
            await self._worker.call(control.Abandon(request.operation))
        await staging

    async def _unload(self, name: str) -> None:
        """Take a model off that does not serve, unmap its image, and map it again."""
        state = await self._worker.call(control.Describe())
        if any(one.model == name for one in state.engines):
            request = control.Exchange(self._operation(), (name,), discard=True)
            result = await self._exchange(request)
            if result is None or result.error:
                return
        await self._worker.call(control.DetachImage(self._models[name].manifest.digest))
        await self._worker.attach(self._models[name])

    async def _check(self) -> None:
        state = await self._worker.call(control.Describe())
        active = [one.model for one in state.engines if one.status is EngineStatus.ACTIVE]
        if active != ([self._active] if self._active else []):
            raise RuntimeError(f"{active} serve instead of {self._active}: {state.engines}")
        if self._active and not self._models[self._active].manifest.packed:
            token = await self.streams.token(self._active, tuple(range(1, 9)))
            if self._expected.setdefault(self._active, token) != token:
                raise RuntimeError(f"{self._active} gave another token than before")


def make_models() -> list[BuiltModel]:
    """Two plain models and a packed one, with 32 KiB (and 16) of KV a token."""
    spec = dataclasses.replace(decoder(512, 128, 8), heads=8, kv_heads=8)
    return [
        build_model("plain-1@1", spec, 1),
        build_model("plain-2@1", spec, 2),
        build_model("packed@1", spec, 3, "bfloat16", packed=True),
    ]


async def count_failures(count: int, output: Path | None) -> bool:
    """Swap so often; returns whether every count is back where it was, and something failed."""
    models = make_models()
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        async with await BenchWorker.start(
            Path(directory),
            MEMORY_PAGES * PAGE_BYTES,
            *("--failpoints", switched_on(), "--stage-timeout-s", f"{STAGE_TIMEOUT_S}"),
            *("--parking-bytes", f"{PARKING_BYTES}"),
            environment=ENVIRONMENT,
        ) as worker:
            for built in models:
                await worker.attach(built)
            mix = Mix(worker, models)
            await mix.begin()
            while mix.swaps < SETTLE_SWAPS and mix.swaps < count:
                await mix.swap()
            await mix.reset()
            before, started = await holdings(worker), time.monotonic()
            mix.outcomes.clear()
            mix.swaps = 0
            await mix.begin()
            while mix.swaps < count:
                await mix.swap()
            seconds = time.monotonic() - started
            await mix.reset()
            after = await holdings(worker)
            mix.streams.close()
    failed = sum(times for what, times in mix.outcomes.items() if what != "committed")
    figures = [
        Figure("swaps", f"{count} in {seconds:.1f} s"),
        *(Figure(f"  {what}", f"{times}") for what, times in sorted(mix.outcomes.items())),
        Figure("failed", f"{failed}", "at least 5 %", failed >= count * 0.05),
        *(Figure(f"requests: {end}", f"{n}") for end, n in sorted(mix.streams.ends.items())),
        *compared(before, after, SLACK),
    ]
    return report(
        f"{count} swaps with failures mixed in",
        figures,
        parameters={
            "count": count,
            "seed": SEED,
            "memory_pages": MEMORY_PAGES,
            "failpoints": switched_on(),
            "weights_bytes": models[0].manifest.weights_bytes,
        },
        measurements={
            "before": before,
            "after": after,
            "seconds": seconds,
            "outcomes": dict(mix.outcomes),
        },
        output=output,
    )
