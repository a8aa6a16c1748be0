"""How long a swap to a STAGED model takes on a GPU: nothing crosses the link, whatever its size.

    python -m bench.staged_cuda [--rounds 20] [--output bench/results/gpu-staged-8b.json] [--fake]

Two 8B models in bf16 alternate on one worker with memory for both, and what leaves stays on the
device. Measured are the exchange's sending to its commit, and to the first token of a request that
is sent then. The two are one image under two names, which no figure can tell. A dry run does it in
small sizes over a fake driver. `bench.staged` measures the same on the host device, and on a node.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results import Figure, report
from bench.shapes import large_model, same_image
from bench.swap_cuda import LIMITS, PROMPT, Setting, note_host_memory

NAME = "8B"
READY_MS_MAX = 10.0
WARM_ROUNDS = 4


async def measure(rounds: int, output: Path | None, *, fake: bool) -> bool:
    """Alternate two models that stay; returns whether the bound was met. Raises RuntimeError."""
    setting = Setting.of(fake)
    spec = setting.shape(NAME)
    note_host_memory(2 * spec.parameters)
    first = large_model(f"{NAME}-1@1", spec, 1, "bfloat16")
    models = [first, same_image(first, f"{NAME}-2@1")]
    weights_bytes = first.manifest.weights_bytes
    memory_bytes = 2 * setting.memory_bytes(weights_bytes)
    pool_pages = (memory_bytes - setting.workspace_bytes) // setting.page_bytes
    present = setting.used_bytes() + pool_pages * setting.page_bytes
    ready_s, token_s = [], []
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        async with await setting.start(Path(directory), memory_bytes) as worker:
            await setting.until_used(present)
            await worker.attach(first)
            outgoing: str | None = None
            for number in range(WARM_ROUNDS + rounds):
                incoming = models[number % 2]
                started = time.monotonic()
                seconds, result = await worker.exchange(
                    f"{number}", outgoing, incoming, LIMITS, keep_staged=True
                )
                await worker.answer(incoming.model, PROMPT)
                answered_s = time.monotonic() - started
                outgoing = incoming.model
                if number >= WARM_ROUNDS:
                    if result.ledger.copied_bytes or result.ledger.evicted_bytes:
                        raise RuntimeError(f"swap {number} was not to a STAGED model")
                    ready_s.append(seconds)
                    token_s.append(answered_s)
    ready_ms = statistics.median(ready_s) * 1000
    figures = [
        Figure(
            "exchange sent to committed",
            f"{ready_ms:.2f} ms",
            f"<= {READY_MS_MAX:g} ms",
            None if fake else ready_ms <= READY_MS_MAX,
        ),
        Figure("the same to a first token", f"{statistics.median(token_s) * 1000:.1f} ms"),
        Figure("the slowest to committed", f"{max(ready_s) * 1000:.2f} ms"),
    ]
    return report(
        f"swap to a STAGED model on the GPU, {NAME} in bf16" + (" (dry run)" if fake else ""),
        figures,
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": memory_bytes,
            "rounds": rounds,
            "prompt_tokens": len(PROMPT),
        },
        measurements={"ready_s": ready_s, "first_token_s": token_s},
        output=output,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bound was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fake", action="store_true", help="dry run over a fake driver")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    return 0 if asyncio.run(measure(values.rounds, values.output, fake=values.fake)) else 1


if __name__ == "__main__":
    sys.exit(main())
