"""Requests that go on for as long as a benchmark swaps under them.

It owns the requests on a worker's token link and reads their answers all the time, so that the
worker never waits for credit. Invariant: a request that ends by itself is an error: what is
measured is of as many as were begun.
"""

from __future__ import annotations

import asyncio

from bench.worker import BenchWorker
from engine.link import tokens

CONTEXT_TOKENS = 4096
"""Long enough that no request ends while it is swapped to and fro."""


class Traffic:
    """The requests' answers, read all the time so that the worker never waits for credit."""

    def __init__(self, worker: BenchWorker, vocabulary: int) -> None:
        self._worker = worker
        self._vocabulary = vocabulary
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
            prompt = tuple((number + place) % self._vocabulary for place in range(length))
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
        """Forget them."""
        self.task.cancel()
        for number in self._seen:
            self._worker.gateway.post(tokens.Cancel(number))
