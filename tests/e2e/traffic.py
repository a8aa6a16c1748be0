"""Streams of completions through the real openai client, each answer compared with the oracle."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

REQUEST_TIMEOUT_S = 100.0


@dataclass
class Outcome:
    """What came of the traffic: how many answers of each model were right, and what was not."""

    right: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def total(self) -> int:
        return sum(self.right.values())

    def score(self, model: str, problem: str = "") -> None:
        """Count one answer, right unless a problem is given."""
        if problem:
            self.problems.append(problem)
        else:
            self.right[model] = self.right.get(model, 0) + 1
        self.changed.set()

    async def until(self, wanted: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until `wanted`, or until something went wrong."""
        async with asyncio.timeout(timeout_s):
            while not wanted() and not self.problems:
                self.changed.clear()
                await self.changed.wait()


def openai_client(http_url: str) -> AsyncOpenAI:
    """A client that never retries: a lost request must be seen."""
    return AsyncOpenAI(
        base_url=f"{http_url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S
    )


async def complete(client: AsyncOpenAI, model: str, prompt: str, tokens: int) -> str:
    """One streamed greedy completion, as text."""
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def one_stream(
    client: AsyncOpenAI,
    model: str,
    prompts: tuple[str, ...],
    tokens: int,
    expected: Callable[[str, str, int], str],
    outcome: Outcome,
    stop: asyncio.Event,
    *,
    offset: int = 0,
) -> None:
    """Ask `model` prompt after prompt until `stop`; every answer is scored."""
    for prompt in itertools.islice(itertools.cycle(prompts), offset, None):
        if stop.is_set():
            return
        try:
            answer = await complete(client, model, prompt, tokens)
        except OpenAIError as error:
            outcome.score(model, f"{model} {prompt!r}: {type(error).__name__}: {error}")
            continue
        right = answer == expected(model, prompt, tokens)
        outcome.score(model, "" if right else f"{model} {prompt!r} answered {answer!r}")
