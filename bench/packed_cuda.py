"""How long a swap to a packed image takes on a GPU, held against the unpacked weights' bytes.

One worker, and one model's weights under two names: as a plain image and as a packed one. The two
take turns, so that every second swap is one to the packed image, its neighbour one to the plain.
Measured is from the sending of the exchange to the first token for a prompt of 64; the rate is that
of pinned copies, taken before and after. Both must give the same token. A dry run does all of it in
small sizes over a fake driver, where the processor unpacks.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bench.results import Figure, report
from bench.shapes import large_model
from bench.swap_cuda import LIMITS, PROMPT, WARM_SWAPS, Setting, note_host_memory, pinned_rate
from bench.worker import BenchWorker, BuiltModel
from swap.pieces import device_bytes

RATIO_MAX = 0.80
PHASES = ("evict_ms", "copy_ms", "verify_ms", "total_ms")


@dataclass
class Found:
    """What was measured. Seconds, bytes per second, and ledgers by the image's kind."""

    rates: list[float] = field(default_factory=list)
    first_token_s: dict[str, list[float]] = field(default_factory=dict)
    ledgers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


async def measure_packed_swaps(name: str, rounds: int, output: Path | None, *, fake: bool) -> bool:
    """Alternate both images; returns whether the bound was met. Raises RuntimeError."""
    setting = Setting.of(fake)
    spec = setting.shape(name)
    note_host_memory(2 * 2 * spec.parameters)
    models = {
        kind: large_model(f"{name}-{kind}@1", spec, 1, "bfloat16", packed=kind == "packed")
        for kind in ("plain", "packed")
    }
    memory_bytes = setting.memory_bytes(device_bytes(models["packed"].manifest))
    found = Found()
    found.rates.append(pinned_rate(setting.device(setting.link_bytes)))
    pool_bytes = memory_bytes - setting.workspace_bytes
    present = setting.used_bytes() + pool_bytes // setting.page_bytes * setting.page_bytes
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        async with await setting.start(Path(directory), memory_bytes) as worker:
            await setting.until_used(present)
            await alternate(worker, models, rounds, found)
    found.rates.append(pinned_rate(setting.device(setting.link_bytes)))
    weights_bytes, stored_bytes = (
        models["plain"].manifest.weights_bytes,
        models["packed"].manifest.stored_bytes,
    )
    return report(
        f"swap to a packed image on the GPU, {name} in bf16" + (" (dry run)" if fake else ""),
        figures_of(weights_bytes, stored_bytes, found, fake=fake),
        parameters={
            "weights_bytes": weights_bytes,
            "stored_bytes": stored_bytes,
            "memory_bytes": memory_bytes,
            "page_bytes": setting.page_bytes,
            "rounds": rounds,
            "prompt_tokens": len(PROMPT),
        },
        measurements=vars(found),
        output=output,
    )


async def alternate(
    worker: BenchWorker, models: dict[str, BuiltModel], rounds: int, found: Found
) -> None:
    """Swap from the plain image to the packed one and back, so many times."""
    for built in models.values():
        await worker.attach(built)
    outgoing: str | None = None
    expected: int | None = None
    for number in range(WARM_SWAPS + 2 * rounds):
        kind = ("plain", "packed")[number % 2]
        incoming = models[kind]
        swap_s, result = await worker.swap(f"{number}", outgoing, incoming, PROMPT, limits=LIMITS)
        token = await worker.answer(incoming.model, PROMPT)
        expected = token if expected is None else expected
        if result.error or token != expected:
            raise RuntimeError(f"swap {number}, {kind}: {result.error or 'another token'}")
        outgoing = incoming.model
        if number >= WARM_SWAPS:
            found.first_token_s.setdefault(kind, []).append(swap_s)
            found.ledgers.setdefault(kind, []).append(msgspec.to_builtins(result.ledger))


def figures_of(weights_bytes: int, stored_bytes: int, found: Found, *, fake: bool) -> list[Figure]:
    """What is quoted. A dry run meets no bound: its times mean nothing."""
    rate = statistics.mean(found.rates)
    floor_s = weights_bytes / rate
    median = {kind: statistics.median(taken) for kind, taken in found.first_token_s.items()}
    packed_s, plain_s = median["packed"], median["plain"]
    return [
        Figure("pinned copies, host to device", f"{rate / 1e9:.2f} GB/s"),
        Figure("the unpacked weights' bytes at that rate", f"{floor_s * 1000:.1f} ms"),
        Figure("bytes that cross the link", f"{stored_bytes / weights_bytes:.3f} of those"),
        Figure(
            "to the packed image: exchange sent to first token",
            f"{packed_s * 1000:.1f} ms ({packed_s / floor_s:.2f} x, and {packed_s / plain_s:.2f} x "
            "the plain image's)",
            f"<= {RATIO_MAX:g} x the unpacked weights' bytes at that rate",
            None if fake else packed_s <= RATIO_MAX * floor_s,
        ),
        Figure(
            "to the plain image: exchange sent to first token",
            f"{plain_s * 1000:.1f} ms ({plain_s / floor_s:.2f} x)",
        ),
        *(
            Figure(
                f"  {kind}: {phase}",
                f"{statistics.median(one[phase] for one in ledgers):.1f} ms",
            )
            for kind, ledgers in sorted(found.ledgers.items())
            for phase in PHASES
        ),
    ]
