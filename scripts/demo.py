"""The demo: two models, one partition, swaps under live traffic, everything checked.

It starts a simulated node in a temporary directory, records what each model answers when nothing
else goes on, then streams chat requests to both models at once while it swaps them back and forth,
and compares every answer with the recorded one. It exits 0 only if none was lost or different.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from hotbay.local_node import LocalNode
from hotbay.v1 import common_pb2, model_pb2
from openai import AsyncOpenAI, OpenAIError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1] / "examples" / "models"
MODELS = ("prose", "code")
QUESTIONS = (
    "What does the licence say about warranty?",
    "How are files opened and closed?",
    "Explain what a class is.",
    "What happens when an error is raised?",
)
ANSWER_TOKENS = 64
STREAMS_PER_MODEL = 6
REQUEST_TIMEOUT_S = 120.0
BETWEEN_SWAPS_S = 0.4
LINK_BYTES_PER_S = 1e9
MEMORY_BYTES = 256 << 20

# A table is not to be squeezed where output goes to a file.
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class Score:
    """What came of the traffic."""

    right: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Swapped:
    """One swap, by the name of its operation."""

    outgoing: str
    incoming: str
    operation: str


async def ask(client: AsyncOpenAI, model: str, question: str) -> str:
    """One streamed chat completion, greedy, as text."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return "".join(pieces)


async def record(node: LocalNode, client: AsyncOpenAI) -> dict[tuple[str, str], str]:
    """What each model answers when it is alone; ends with the first model ACTIVE."""
    answers = {}
    current = MODELS[0]
    for model in (MODELS[1], MODELS[0]):
        await asyncio.to_thread(swap, node, current, model)
        current = model
        for question in QUESTIONS:
            answers[model, question] = await ask(client, model, question)
    return answers


def swap(node: LocalNode, outgoing: str, incoming: str) -> Swapped:
    """One commanded swap, waited for."""
    operation = node.client.wait(node.client.swap(outgoing, incoming))
    return Swapped(outgoing, incoming, operation.name)


def ledger(node: LocalNode, one: Swapped) -> common_pb2.Ledger:
    """A swap's ledger as it is now; the first token may come after the swap's end."""
    response = model_pb2.SwapModelResponse()
    node.client.operation(one.operation).response.Unpack(response)
    return response.ledger


async def stream_on(
    client: AsyncOpenAI,
    model: str,
    answers: dict[tuple[str, str], str],
    score: Score,
    stop: asyncio.Event,
) -> None:
    """Ask one model question after question until told to stop; score every answer."""
    for question in itertools.cycle(QUESTIONS):
        if stop.is_set():
            return
        try:
            answer = await ask(client, model, question)
        except OpenAIError as error:
            score.problems.append(f"{model} did not answer {question!r}: {error}")
            continue
        if answer == answers[model, question]:
            score.right += 1
        else:
            score.problems.append(f"{model} answered {question!r} with {answer!r}")


async def swap_under_traffic(
    node: LocalNode, client: AsyncOpenAI, answers: dict[tuple[str, str], str], count: int
) -> tuple[list[Swapped], Score]:
    """`count` swaps back and forth while every stream goes on."""
    score, stop = Score(), asyncio.Event()
    swaps: list[Swapped] = []
    async with asyncio.TaskGroup() as group:
        for model in MODELS * STREAMS_PER_MODEL:
            group.create_task(stream_on(client, model, answers, score, stop))
        try:
            for number in range(count):
                await asyncio.sleep(BETWEEN_SWAPS_S)
                outgoing, incoming = MODELS if number % 2 == 0 else MODELS[::-1]
                swaps.append(await asyncio.to_thread(swap, node, outgoing, incoming))
        finally:
            stop.set()
        # What is held for the model that is away must be answered too.
        outgoing, incoming = MODELS if count % 2 == 0 else MODELS[::-1]
        await asyncio.sleep(BETWEEN_SWAPS_S)
        swaps.append(await asyncio.to_thread(swap, node, outgoing, incoming))
    return swaps, score


def print_swaps(swaps: list[Swapped], ledgers: list[common_pb2.Ledger]) -> None:
    """The table of ledgers."""
    table = Table(title="Swaps under traffic", title_justify="left", box=None)
    phases = [phase.name for phase in ledgers[0].phases]
    headings = ["swap", *(f"{name}\nms" for name in phases), "total\nms", "first\ntoken ms"]
    headings += ["copy\nGB/s", "% of\nlink", "finished", "kept", "lost"]
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for one, each in zip(swaps, ledgers, strict=True):
        table.add_row(
            f"{one.outgoing} > {one.incoming}",
            *(f"{phase.duration_ms:.1f}" for phase in each.phases),
            f"{each.total_ms:.1f}",
            f"{each.first_token_ms:.1f}" if each.first_token_ms else "-",
            f"{each.copy_bytes_per_second / 1e9:.1f}",
            f"{each.link_percent:.0f}",
            str(each.requests_finished),
            str(each.requests_kept),
            str(each.requests_lost),
        )
    console.print(table)


def print_samples(answers: dict[tuple[str, str], str]) -> None:
    """What a swap changes, in words."""
    question = QUESTIONS[0]
    for model in MODELS:
        console.print(f"[bold]{model}[/bold], asked {question!r}:")
        console.print(escape(answers[model, question].strip()), style="dim")


def print_next(node: LocalNode) -> None:
    """What to try on the node that is left running."""
    console.print(
        f"""
The node is left running in {node.directory}. Try:

  export HOTBAY_ENDPOINT={node.endpoint}
  .venv/bin/gpuctl status
  .venv/bin/gpuctl swap prose code
  .venv/bin/gpuctl run code "Explain what a class is."
  .venv/bin/gpuctl events -f
  curl -s {node.http_url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "prose", "messages": [{{"role": "user", "content": "The licence"}}]}}'
  .venv/bin/python -c "from openai import OpenAI
client = OpenAI(base_url='{node.http_url}/v1', api_key='none')
for c in client.completions.create(model='code', prompt='class Node:', stream=True):
    print(c.choices[0].text, end='')"

End it with: kill {node.pid}""",
        highlight=False,
        markup=False,
    )


async def show(node: LocalNode, count: int) -> bool:
    """The whole demo on a running node; says whether everything was right."""
    for model in MODELS:
        node.client.wait(node.client.load(model))
    client = AsyncOpenAI(
        base_url=f"{node.http_url}/v1",
        api_key="none",
        max_retries=0,
        timeout=REQUEST_TIMEOUT_S,
    )
    answers = await record(node, client)
    swaps, score = await swap_under_traffic(node, client, answers, count)
    await client.close()
    ledgers = [ledger(node, one) for one in swaps]
    print_swaps(swaps, ledgers)
    print_samples(answers)
    lost = sum(each.requests_lost for each in ledgers)
    for problem in score.problems[:10]:
        console.print(escape(problem), style="red")
    console.print(
        f"{len(swaps)} swaps; {score.right} answers right, {len(score.problems)} lost or wrong, "
        f"{lost} requests lost by swaps"
    )
    return score.right > 0 and not score.problems and not lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the node running")
    parser.add_argument("--swaps", type=int, default=12, help="how many (default 12)")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    # Whoever ends the demo ends its node with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    node = LocalNode(
        Path(tempfile.mkdtemp(prefix="hotbay-demo-")),
        repository=REPOSITORY,
        # One model at a time, and swaps only as commanded: that is what is shown. The partition's
        # link is throttled: images this small would cross the host's own through its caches.
        config={
            "scheduling": {"max_active_models": 1, "swap_on_demand": False},
            "worker": {"link_bytes_per_s": LINK_BYTES_PER_S, "memory_bytes": MEMORY_BYTES},
        },
    )
    node.start()
    right = False
    try:
        console.print(
            f"A simulated H200 serves on {node.http_url}; its link is {LINK_BYTES_PER_S:.0e} B/s"
        )
        right = asyncio.run(show(node, max(10, arguments.swaps)))
        console.print(
            f"{'All right' if right else 'NOT right'} after {time.monotonic() - started_s:.0f} s"
        )
    finally:
        if not (arguments.keep and right):
            node.stop()
        if right and not arguments.keep:
            shutil.rmtree(node.directory)
        elif not right:
            console.print(f"The logs are in {node.directory}")
    if arguments.keep and right:
        # A daemon may be replaced under its node: the new one swaps by itself on demand.
        node.config["scheduling"]["swap_on_demand"] = True
        node.kill()
        node.start()
        print_next(node)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
