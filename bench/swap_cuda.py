"""How long a swap takes on a GPU, held against the image's bytes at the measured rate of the link.

Alternates two models of random bf16 weights in the shapes of Llama 3.2 1B and Llama 3.1 8B on one
worker, and measures from the sending of the exchange to the arrival of the incoming model's first
token for a prompt of 64. The rate is that of pinned copies, taken just before by the same calls
that the worker copies with. The bench plays hotbayd and the gateway; the worker is the real one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from bench.results import Figure, report
from bench.worker import BenchWorker, build_model
from engine.models.spec import ModelSpec, Rope
from swap.arena import PagePool
from swap.cuda_device import PAGE_BYTES, CudaDevice
from swap.device import DeviceMemory
from swap.transfer import measure_link

SHAPES: Mapping[str, tuple[int, int, int, int, bool]] = MappingProxyType(
    # Layers, hidden, head_dim, intermediate, tied; 32 heads, 8 of keys, 128256 tokens.
    {"1B": (16, 2048, 64, 8192, True), "8B": (32, 4096, 128, 14336, False)}
)
PROMPT = tuple(range(1, 65))
RATIO_MAX, OVERHEAD_S = 1.05, 0.015
WARM_SWAPS = 4
LINK_BYTES = 1 << 30
WORKSPACE_BYTES = 3 << 30
KV_BYTES = 1 << 30


def shape(name: str) -> ModelSpec:
    """A decoder of one of SHAPES."""
    layers, hidden, head_dim, intermediate, tied = SHAPES[name]
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden=hidden,
        heads=32,
        kv_heads=8,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=128_256,
        context_tokens=512,
        tied=tied,
        norm_epsilon=1e-5,
        rope=Rope(theta=500_000.0),
        eos_token_ids=(),
    )


def pinned_rate(device: DeviceMemory) -> float:
    """Bytes per second of one pinned copy of LINK_BYTES."""
    try:
        return measure_link(PagePool(device), LINK_BYTES)
    finally:
        device.close()


async def measure_gpu_swaps(name: str, rounds: int, output: Path | None) -> bool:
    """Alternate two models; returns whether the bound was met. Raises RuntimeError."""
    rate = pinned_rate(CudaDevice(LINK_BYTES))
    models = [build_model(f"{name}-{seed}@1", shape(name), seed, "bfloat16") for seed in (1, 2)]
    weights_bytes = models[0].manifest.weights_bytes
    memory_bytes = weights_bytes + PAGE_BYTES + KV_BYTES + WORKSPACE_BYTES
    options = ("--device", "cuda", "--workspace-bytes", str(WORKSPACE_BYTES))
    swaps, ledgers = [], []
    expected: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await BenchWorker.start(Path(directory), memory_bytes, *options)
        for built in models:
            await worker.attach(built)
        outgoing: str | None = None
        for number in range(WARM_SWAPS + rounds):
            incoming = models[number % 2]
            swap_s, result = await worker.swap(f"{number}", outgoing, incoming, PROMPT)
            token = await worker.answer(incoming.model, PROMPT)
            if result.error or expected.setdefault(incoming.model, token) != token:
                raise RuntimeError(f"swap {number}: {result.error or 'another token'}")
            outgoing = incoming.model
            if number >= WARM_SWAPS:
                swaps.append(swap_s)
                ledgers.append(msgspec.to_builtins(result.ledger))
        await worker.close()
    floor_s, swap_s = weights_bytes / rate, statistics.median(swaps)
    limit_s = RATIO_MAX * floor_s + OVERHEAD_S
    phases = ("drain_ms", "evict_ms", "copy_ms", "verify_ms", "total_ms")
    figures = [
        Figure("pinned copies, host to device", f"{rate / 1e9:.2f} GB/s"),
        Figure("the image's bytes at that rate", f"{floor_s * 1000:.1f} ms"),
        Figure(
            "exchange sent to first token",
            f"{swap_s * 1000:.1f} ms ({swap_s / floor_s:.2f} x the floor)",
            f"<= {RATIO_MAX:g} x the floor + {OVERHEAD_S * 1000:.0f} ms = {limit_s * 1000:.1f} ms",
            swap_s <= limit_s,
        ),
        *(
            Figure(f"  {phase}", f"{statistics.median(one[phase] for one in ledgers):.1f} ms")
            for phase in phases
        ),
    ]
    return report(
        f"swap on the GPU, {name} in bf16",
        figures,
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": memory_bytes,
            "page_bytes": PAGE_BYTES,
            "rounds": rounds,
            "prompt_tokens": len(PROMPT),
        },
        measurements={"link_bytes_per_s": rate, "first_token_s": swaps, "ledgers": ledgers},
        output=output,
    )
