"""How long a swap to a STAGED model takes: nothing is copied, so its size must not matter.

    python -m bench.staged [--rounds 30] [--output bench/results/staged.json]

First two models of 1 GiB alternate on one worker, both staying on the device: from the sending of
the exchange to its answer, and to the first token. Then two small models alternate on a whole node:
from the call of SwapModel to the operation's end, journal, routes and all. Last a model comes in of
which nothing, the first layers, or all was staged.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hotbay.local_node import LocalNode
from hotbay.v1 import model_pb2

from bench.node import REPOSITORY
from bench.results import Figure, report
from bench.swap import HIDDEN, LAYERS, PROMPT, VOCABULARY, milliseconds, start
from bench.worker import LIMITS, BenchWorker, build_model, decoder
from engine.link import control

READY_S_MAX = 0.010
SHARES = (0.0, 0.25, 0.5, 1.0)
PART_VOCABULARY, PART_HIDDEN, PART_LAYERS = 4096, 512, 8
PART_LINK_BYTES_PER_S = 500e6
PART_ROUNDS = 7
WARM_ROUNDS = 4


async def on_a_worker(rounds: int) -> tuple[int, list[float], list[float]]:
    """Bytes of weights, and seconds to the answer and to the first token of each round."""
    models = [build_model(f"bench-{seed}@1", decoder(VOCABULARY, HIDDEN, LAYERS), seed)
              for seed in (1, 2)]  # fmt: skip
    weights_bytes = models[0].manifest.weights_bytes
    ready, first_token = [], []
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await start(Path(directory), 2 * weights_bytes + (256 << 20), models)
        outgoing: tuple[str, ...] = ()
        for number in range(WARM_ROUNDS + rounds):
            incoming = models[number % 2]
            request = control.Exchange(
                operation=f"{number}",
                outgoing=outgoing,
                incoming=control.EngineSpec(incoming.model, incoming.manifest.digest, 128, 8, 64),
                keep_staged=True,
            )
            started = time.monotonic()
            result = (await worker.call(request)).result
            ready_s = time.monotonic() - started
            await worker.answer(incoming.model, PROMPT)
            token_s = time.monotonic() - started
            outgoing = (incoming.model,)
            if result.error or (number >= 2 and result.ledger.copied_bytes):
                raise RuntimeError(result.error or "bytes were copied")
            if number >= WARM_ROUNDS:
                ready.append(ready_s)
                first_token.append(token_s)
        await worker.close()
    return weights_bytes, ready, first_token


async def in_part(rounds: int) -> tuple[int, dict[float, list[tuple[float, float]]]]:
    """Bytes of weights; by the share that is staged, seconds to the commit and to the first token
    of each round. The shares take turns, over a throttled link."""
    shape = decoder(PART_VOCABULARY, PART_HIDDEN, PART_LAYERS)
    first, second = (build_model(f"bench-{seed}@1", shape, seed) for seed in (1, 2))
    weights_bytes = first.manifest.weights_bytes
    found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    spec = control.EngineSpec(second.model, second.manifest.digest, *LIMITS)
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await BenchWorker.start(
            Path(directory),
            2 * weights_bytes + (256 << 20),
            *("--link-bytes-per-s", str(PART_LINK_BYTES_PER_S)),
        )
        for model in (first, second):
            await worker.attach(model)
        await worker.exchange("begin", None, first)
        for number in range(1 + rounds):
            for share in SHARES:
                name = f"{number}-{share:g}"
                if share:
                    part = int(share * weights_bytes)
                    await worker.call(control.StageWeights(f"{name}-part", spec, bytes_max=part))
                token_s, result = await worker.swap(name, first.model, second, PROMPT)
                if result.error or bool(result.ledger.copied_bytes) != (share < 1):
                    raise RuntimeError(result.error or f"{result.ledger.copied_bytes} bytes copied")
                if number:
                    found[share].append((result.ledger.total_ms / 1000, token_s))
                await worker.exchange(f"{name}-back", second.model, first)
        await worker.close()
    return weights_bytes, found


def on_a_node(rounds: int) -> list[float]:
    """Seconds from calling SwapModel to the end of its operation, each round."""
    config = {"scheduling": {"max_active_models": 1, "swap_on_demand": False}}
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root,
        LocalNode(Path(root) / "node", repository=REPOSITORY, config=config) as node,
    ):
        node.client.wait(node.client.load("prose"))
        node.client.wait(node.client.stage("code"))
        pair = ("prose", "code")
        for number in range(WARM_ROUNDS + rounds):
            started = time.monotonic()
            operation = node.client.wait(node.client.swap(*pair))
            seconds = time.monotonic() - started
            response = model_pb2.SwapModelResponse()
            operation.response.Unpack(response)
            if response.ledger.copied_bytes:
                raise RuntimeError("bytes were copied")
            pair = pair[::-1]
            if number >= WARM_ROUNDS:
                found.append(seconds)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    weights_bytes, ready, first_token = asyncio.run(on_a_worker(arguments.rounds))
    whole = on_a_node(arguments.rounds)
    part_bytes, parts = asyncio.run(in_part(PART_ROUNDS))
    limit = milliseconds(READY_S_MAX)
    figures = [
        Figure(
            f"worker, {weights_bytes >> 20} MiB each: exchange sent to ready",
            milliseconds(statistics.median(ready)),
            f"<= {limit}",
            statistics.median(ready) <= READY_S_MAX,
        ),
        Figure(
            f"  to the first token of {len(PROMPT)} prompt tokens",
            milliseconds(statistics.median(first_token)),
        ),
        Figure(
            "whole node: SwapModel called to its operation's end",
            milliseconds(statistics.median(whole)),
            f"<= {limit}",
            statistics.median(whole) <= READY_S_MAX,
        ),
    ]
    nothing_s = statistics.median(token_s for _, token_s in parts[0.0])
    for share, rounds in parts.items():
        commit_s, token_s = (statistics.median(each) for each in zip(*rounds, strict=True))
        figures.append(
            Figure(
                f"{part_bytes >> 20} MiB over {PART_LINK_BYTES_PER_S / 1e6:.0f} MB/s, "
                f"{share:.0%} staged: to the first token",
                f"{milliseconds(token_s)} ({token_s / nothing_s:.2f} x), "
                f"committed in {milliseconds(commit_s)}",
            )
        )
    met = report(
        "Swap to a staged model",
        figures,
        parameters={"weights_bytes": weights_bytes, "rounds": arguments.rounds},
        measurements={"ready_s": ready, "first_token_s": first_token, "whole_node_s": whole}
        | {f"staged_{share:g}_s": found for share, found in parts.items()},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
